"""Stand-in for Transformers' export tests, which the distribution lacks: a smaller test of the same exporter."""

from __future__ import annotations

import copy

import torch
from transformers import set_seed
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter


class ExportTesterMixin:
    def test_torch_export(self):
        """Each model class goes through `torch.export`, and the exported program gives the model's output."""
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                set_seed(0)
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                config.use_cache = False
                model = model_class(config).eval()
                inputs = self._prepare_for_class(inputs, model_class)
                with torch.no_grad():
                    exported = DynamoExporter().export(model, copy.deepcopy(inputs), config=DynamoConfig(dynamic=True))
                    program = exported.module() if isinstance(exported, torch.export.ExportedProgram) else exported
                    expected, actual = model(**inputs), program(**inputs)
                torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
