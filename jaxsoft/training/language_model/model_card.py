"""What a run leaves for others: its weights in one file, and a page about them.

The weights are a safetensors file: a tensor a parameter, named by its place in the
model (`trunk.blocks.0.attention.out.kernel`), in the layout that Flax has it. Its
metadata has the run's options as JSON. A tree, bands or a sampler are made from
`counts.npy`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxsoft.training.heads import Params
from jaxsoft.training.language_model.config import FREE_FIELDS, LanguageModelConfig
from jaxsoft.training.language_model.report import FinalReport
from jaxsoft.training.language_model.summary import summary_lines
from jaxsoft.training.reporting import Record, printable

__all__ = ["model_card", "named_tensors", "weights_file"]


def named_tensors(params: Params) -> dict[str, np.ndarray]:
    """The parameters of a model by their names.

    Args:
      params: an `nnx.State`.

    Returns:
      Arrays by the names of their places, with dots between.
    """
    flat = nnx.to_flat_state(params)
    return {
        ".".join(map(str, path)): np.ascontiguousarray(jax.device_get(leaf[...]))
        for path, leaf in flat
    }


def weights_file(params: Params, config: LanguageModelConfig, step: int) -> bytes:
    """The contents of a safetensors file of a model's parameters.

    Args:
      params: an `nnx.State`.
      config: what was trained.
      step: updates made.
    """
    from safetensors.numpy import save

    metadata = {
        "format": "flax",
        "model": "jaxsoft language model",
        "step": str(step),
        "config": json.dumps(_options(config)),
    }
    return save(named_tensors(params), metadata)


def model_card(
    config: LanguageModelConfig,
    description: Record,
    report: FinalReport,
    parameters: int,
) -> str:
    """A page of Markdown about a trained model.

    Args:
      config: what was trained.
      description: the contents of the run's `config.json`.
      report: what it measured.
      parameters: how many numbers were trained.
    """
    corpus, tokens = description["corpus"], description["tokens"]
    versions = ", ".join(f"{k} {v}" for k, v in description["versions"].items())
    sections = {
        "Data": [
            f"- corpus: {_code(corpus['source'])}, {corpus['bytes']:,} bytes; digest "
            f"`{corpus['digest']}`",
            f"- texts: {corpus['train_texts']:,} to train, "
            f"{corpus['validation_texts']:,} to validate; {corpus['skipped']:,} files "
            f"were no text, {corpus['duplicates']:,} were copies",
            f"- tokens: {tokens['train_tokens']:,} to train, "
            f"{tokens['validation_tokens']:,} to validate; byte-level BPE of "
            f"{tokens['vocab_size']:,}",
        ],
        "What it reached": [f"- {line}" for line in summary_lines(report)],
        "Options": _table(_options(config)),
        "Made with": [
            f"- {versions}",
            f"- {math.prod(description['mesh'].values())} × {description['device']}",
        ],
        "Use": [
            "```python",
            "from jaxsoft.training import load_language_model",
            "",
            'trained = load_language_model("RUN")  # this folder',
            'print(trained.generate("a prompt", temperature=0.8)[0].text)',
            "```",
            "",
            "It predicts text like the corpus, of which it may repeat parts word for "
            "word; what it says need not be true. `model.safetensors` has the "
            "parameters by name, `tokenizer.json` the tokenizer.",
        ],
    }
    trunk = (
        f"{config.layers} blocks of {config.features} features and {config.heads} "
        "attention heads"
        if description["trunk"] is None
        else f"a trunk of its own, {_code(description['trunk'])}"
    )
    lines = [
        "# Model card",
        "",
        f"A causal language model of {parameters:,} parameters: {trunk}, which was "
        f"trained on {config.sequence_length} tokens of context, under a {config.head} "
        f"softmax head over {report.vocab_size:,} tokens.",
    ]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def _options(config: LanguageModelConfig) -> dict[str, Any]:
    """Options that the model depends on; folders of this machine are none."""
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in FREE_FIELDS
    }


def _table(options: Mapping[str, Any]) -> list[str]:
    """A table of Markdown."""
    rows = [f"| {name} | {_code(value)} |" for name, value in options.items()]
    return ["| option | value |", "|---|---|", *rows]


def _code(value: object) -> str:
    """A value as code on one line, whatever is in it."""
    text = printable(str(value)).replace("\n", "\\n").replace("\t", "\\t")
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"
