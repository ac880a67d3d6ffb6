"""Writes the files by which a checkpoint loads with `trust_remote_code`, without importing query_experts first.

The files hold no model. They import the installed package, so a checkpoint never carries a second, older copy.
"""

from __future__ import annotations

from pathlib import Path

from query_experts.common.files import write_text

AUTO_MAP = {
    "AutoConfig": "configuration_gqe.GQEConfig",
    "AutoModel": "modeling_gqe.GQEModel",
    "AutoModelForCausalLM": "modeling_gqe.GQEForCausalLM",
    "AutoModelForSequenceClassification": "heads_gqe.GQEForSequenceClassification",
    "AutoModelForTokenClassification": "heads_gqe.GQEForTokenClassification",
    "AutoModelForQuestionAnswering": "heads_gqe.GQEForQuestionAnswering",
}
SHIMS = {
    "configuration_gqe.py": ("GQEConfig",),
    "modeling_gqe.py": ("GQEForCausalLM", "GQEModel"),
    # apart, so that a language model still loads where an older package without heads is installed
    "heads_gqe.py": ("GQEForQuestionAnswering", "GQEForSequenceClassification", "GQEForTokenClassification"),
}
# Transformers checks imports outside of `try`, and would name a package that pip doesn't know
SHIM = '''"""This checkpoint's code is the package query-experts; this file only tells Transformers where to find it."""

try:
    from query_experts import {names}
except ModuleNotFoundError as error:
    if error.name != "query_experts":
        raise
    raise ImportError(
        "this checkpoint is a Grouped Query Experts model, whose code is a package: pip install query-experts"
    ) from error

__all__ = [{quoted}]
'''


def write_shim(folder: Path) -> None:
    """Writes the files that AUTO_MAP names into a checkpoint's folder, replacing those of the same name."""
    for file, names in SHIMS.items():
        quoted = ", ".join(f'"{name}"' for name in names)
        write_text(folder / file, SHIM.format(names=", ".join(names), quoted=quoted))
