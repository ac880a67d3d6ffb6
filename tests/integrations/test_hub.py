"""A checkpoint's folder loads by `trust_remote_code`, without importing query_experts; a missing package is named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, dynamic_module_utils, modeling_utils
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from model_helpers import EXACT, random_tokens, tiny_config, tiny_model
from query_experts import (
    GQEConfig,
    GQEForCausalLM,
    GQEForQuestionAnswering,
    GQEForSequenceClassification,
    GQEForTokenClassification,
    GQEModel,
)
from query_experts.model.remote_code import AUTO_MAP

FILES = {"configuration_gqe.py", "heads_gqe.py", "modeling_gqe.py"}
HEADS = {
    "AutoModelForSequenceClassification": GQEForSequenceClassification,
    "AutoModelForTokenClassification": GQEForTokenClassification,
    "AutoModelForQuestionAnswering": GQEForQuestionAnswering,
}

ELSEWHERE = """
import sys
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, ids, kept = sys.argv[1], torch.load(sys.argv[2]), sys.argv[3]
assert "query_experts" not in sys.modules
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    print("untrusted:", " ".join(str(error).split()))
sys.modules["query_experts"] = None  # as if it wasn't installed
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    print("missing:", error)
del sys.modules["query_experts"]
for name in sys.argv[4:]:
    head = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    assert type(head).__name__ == "GQE" + name.removeprefix("AutoModel"), type(head)
    for module in [name for name in sys.modules if name.split(".")[0] == "query_experts"]:
        del sys.modules[module]  # the next class, too, finds it by the folder's files
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inner = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save((model(ids).logits, inner(ids).last_hidden_state), kept)
model.save_pretrained(folder + "-again")
print("classes:", type(model).__module__, type(inner).__module__)
"""


def test_a_checkpoint_loads_in_a_process_that_knows_nothing_of_the_package(tmp_path):
    model, ids = tiny_model(), random_tokens(2, 7)
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(tmp_path / name) for name in ("model", "ids.pt", "kept.pt")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments, *HEADS],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    printed = dict(line.split(": ", 1) for line in ran.stdout.splitlines())
    assert "trust_remote_code=True" in printed["untrusted"]
    assert "pip install query-experts" in printed["missing"]
    assert printed["classes"] == "query_experts.model.modeling_gqe query_experts.model.modeling_gqe"
    logits, hidden = torch.load(tmp_path / "kept.pt")
    torch.testing.assert_close(logits, model(ids).logits, **EXACT)
    torch.testing.assert_close(hidden, model.model(ids).last_hidden_state, **EXACT)
    for file in FILES:  # not the package's source, which Transformers would copy
        assert (tmp_path / "model-again" / file).read_text() == (tmp_path / "model" / file).read_text()


def test_where_the_package_is_imported_a_checkpoint_asks_for_no_trust(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for trust in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(tmp_path, **trust)) is GQEConfig
        assert type(AutoModel.from_pretrained(tmp_path, **trust)) is GQEModel
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, **trust)) is GQEForCausalLM
        for name, head in HEADS.items():
            assert type(getattr(transformers, name).from_pretrained(tmp_path, **trust)) is head


def test_each_class_that_the_configuration_maps_to_is_the_packages_own(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    tiny_model().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == AUTO_MAP
    found = {name: get_class_from_dynamic_module(reference, tmp_path) for name, reference in auto_map.items()}
    language_model = {"AutoConfig": GQEConfig, "AutoModel": GQEModel, "AutoModelForCausalLM": GQEForCausalLM}
    assert found == language_model | HEADS


def test_a_checkpoint_that_came_from_the_hub_is_saved_with_files_of_its_own(tmp_path):
    config = tiny_config()
    config.auto_map = {name: f"someone/model--{reference}" for name, reference in AUTO_MAP.items()}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert set(os.listdir(tmp_path)) > FILES


def test_pushing_a_model_uploads_the_files_too(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", lambda self, operations, **_: pushed.extend(operations))
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", lambda *_, **__: card)
    tiny_model().save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="someone/model")
    assert {Path(operation.path_in_repo).name for operation in pushed} >= {"config.json", *FILES}


def test_the_files_of_a_checkpoint_from_before_the_heads_still_load(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, ids = tiny_model(num_hidden_layers=1), random_tokens(1, 5)
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "heads_gqe.py").unlink()
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["auto_map"] = {name: AUTO_MAP[name] for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    found = [get_class_from_dynamic_module(reference, tmp_path / "old") for reference in config["auto_map"].values()]
    assert found == [GQEConfig, GQEModel, GQEForCausalLM]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "old", dtype=torch.float64, trust_remote_code=True)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **EXACT)
