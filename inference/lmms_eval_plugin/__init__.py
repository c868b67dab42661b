"""Our models in lmms-eval: `lmms-eval --model attention_aware`, see docs/harnesses.md.

lmms-eval calls `manifest`, which it finds in the entry points `lmms_eval.models` (pyproject.toml), and imports the
class only if it is asked for. Source: EvolvingLMMs-Lab/lmms-eval, v0.7.3: lmms_eval/models/registry_v2.py
"""


def manifest():
    """The name of the model, and the class behind it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("attention_aware", simple_class_path=f"{__name__}.model.AttentionAware")
