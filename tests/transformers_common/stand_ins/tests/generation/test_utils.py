"""Stand-in for Transformers' generation tests, which the distribution leaves out; tests/test_generation.py has ours."""


class GenerationTesterMixin:
    pass
