"""Arms of training, with seeds and controls, on any model and data: run, scored and compared."""
