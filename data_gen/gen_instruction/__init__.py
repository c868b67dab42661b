"""Multi-image instructions and test sets from single-image questions: sequence, collage and picture in picture."""
