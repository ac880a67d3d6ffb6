"""Grouped Query Experts (arXiv 2606.20945): experts and a router inside the attention layer of a language model."""

from query_experts.layers.attention import GQEAttention, Routing
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP, GQEConfig
from query_experts.model.heads import (
    GQEForQuestionAnswering,
    GQEForSequenceClassification,
    GQEForTokenClassification,
    GQEQuestionAnsweringOutput,
    GQESequenceClassifierOutput,
    GQETokenClassifierOutput,
)
from query_experts.model.modeling_gqe import GQECausalLMOutput, GQEForCausalLM, GQEModel
from query_experts_command import __version__ as __version__

__all__ = [
    "GQEAttention",
    "GQECausalLMOutput",
    "GQEConfig",
    "GQEForCausalLM",
    "GQEForQuestionAnswering",
    "GQEForSequenceClassification",
    "GQEForTokenClassification",
    "GQEModel",
    "GQEQuestionAnsweringOutput",
    "GQESequenceClassifierOutput",
    "GQETokenClassifierOutput",
    "Routing",
]

if SHARDS_BY_GROUP:
    import query_experts.model.tensor_parallel  # noqa: F401 - registers the style that GQEConfig's plan names
