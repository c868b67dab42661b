"""What every stage shares: records, conversation, images, layout, attention, checkpoints, generation, runtime.

`from llava import open_model` is the way in from Python (llava/vlm.py).
"""


def __getattr__(name: str):
    """`open_model`, imported when it is asked for: the command line does not wait for it."""
    if name == "open_model":
        from llava.vlm import open_model

        return open_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
