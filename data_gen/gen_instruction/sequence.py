"""Sequences: several pictures in a prompt, each as it is stored."""

from llava.records import IMAGE

SHARES = {2: 34_300, 3: 10_050, 4: 9_950, 5: 8_161}  # published sequences of each number of pictures


def placeholders(num_images: int) -> str:
    """What stands before the question: a numbered line for every picture."""
    return "".join(f"Image{number}:{IMAGE}\n" for number in range(1, num_images + 1))
