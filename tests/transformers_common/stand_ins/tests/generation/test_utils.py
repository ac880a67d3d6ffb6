"""Stand-in for Transformers' generation tests, which the distribution lacks; see tests/model/test_generation.py."""


class GenerationTesterMixin:
    pass
