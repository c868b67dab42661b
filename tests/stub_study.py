"""A study of few arms whose launch scripts are a stub."""

import json
import sys
import textwrap

import pytest

from scripts.study.__main__ import main

QUESTIONS = [
    {"id": f"q{number}", "image": ["a.png", "b.png"], "image_type": "sequence", "target": 2, "others": ["blue"],
     "prompt": "<image><image>In Image2, what?", "answer": "red"}
    for number in range(4)
]  # fmt: skip
# Called as `python STUB SCRIPT FLAGS`, it writes what the launch script would; a trained model's answers are right.
STUB = """
    import json, pathlib, sys, time
    script, flags = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
    (pathlib.Path(__file__).parent / "calls").open("a").write(script.rsplit("/", 1)[1] + "\\n")
    if script.endswith("a100.sh"):
        out = pathlib.Path(flags["--output_dir"])
        out.mkdir(parents=True, exist_ok=True)
        (out / "checkpoint-1").mkdir(exist_ok=True)
        while (pathlib.Path(__file__).parent / "slow").exists():
            time.sleep(0.05)
        if (pathlib.Path(__file__).parent / "broken").exists():
            sys.exit("loading\\nerror: no such model\\nthe training ended with exit code 1")
        (out / "adapter_model.safetensors").write_bytes(flags["--dpo_alpha"].encode())
    elif script.endswith("job.sh"):
        (pathlib.Path(flags["--output"]) / "tuned.json").write_text("{}")
    else:
        text = "red" if flags["--model_name_or_path"].endswith("adapter") or "--alpha" in flags else "blue"
        rows = [{"question_id": f"q{n}", "text": text, "answer": "red", "image_type": "sequence", "target": 2,
                 "num_images": 2, "others": ["blue"]} for n in range(4)]
        pathlib.Path(flags["--output"]).write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


def study_in(tmp_path):
    """A config with its data, and the stub that `words` runs it with."""
    (tmp_path / "pairs.json").write_text("[]")
    (tmp_path / "test.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "images").mkdir()
    (tmp_path / "stub.py").write_text(textwrap.dedent(STUB))
    write(tmp_path, small(tmp_path))
    return tmp_path


def small(folder):
    data = {"file": str(folder / "pairs.json"), "images": str(folder / "images")}
    return {
        "base": "scripts/miniature/base", "data": data, "test": {**data, "file": str(folder / "test.json")},
        "training": {"max_steps": 2}, "answering": {"max_new_tokens": 4}, "seeds": [0, 1],
        "adaptviz": {"steered": {"alpha": 2}},
        "arms": {
            "base": {"adaptviz": ["steered"]},
            "dpo": {"label": "DPO", "flags": {"dpo_alpha": 1}},
            "ours": {"like": "dpo", "flags": {"attention_weight": 0.9}},
        },
    }  # fmt: skip


def write(folder, config):
    (folder / "study.json").write_text(json.dumps(config))


def words(folder, *more):
    launcher = f"{sys.executable} {folder / 'stub.py'}"
    return ["--config", str(folder / "study.json"), "--output", str(folder / "out"), "--launcher", launcher, *more]


def calls(folder):
    return (folder / "calls").read_text().split() if (folder / "calls").exists() else []


def refused(capsys, *arguments):
    """The one line with which a study that cannot be run ends."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    lines = capsys.readouterr().err.strip().split("\n")
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]
