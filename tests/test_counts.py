"""Exact parameter counts: the papers' numbers, and that what is counted is what runs."""

import re
from pathlib import Path

import pytest
import transformers

import methods
import train
from plumbing.errors import UserError
from tests.helpers import small_config
from tools import count_parameters, estimate_memory
from tools.count_parameters import ROWS, count, meta_backbone

XL = {  # T5-XL, 313 tasks: trained on all tasks, Z, and for one new task all, z, mu
    "full": (2_849_757_184, 0, 2_849_757_184, None, None),
    "(IA)^3": (540_672, 0, 540_672, None, None),
    "LoRA": (2_211_840, 0, 2_211_840, None, None),
    "LoRA-big": (35_389_440, 0, 35_389_440, None, None),
    "Private, AdapterSoup": (313 * 2_211_840, 0, 2_211_840, None, 2_211_840),
    "Random": (17_694_720, 0, 17_694_720, None, 2_211_840),
    "Poly": (17_694_720, 1_081_728, 17_694_720 + 3_456, 3_456, 2_211_840),
    "Poly (IA)^3": (4_325_376, 480_768, 4_326_912, 1_536, 540_672),
    "Task-MoE": (17_694_720, 1_081_728, 17_694_720 + 3_456, 3_456, 2_211_840),
    "HyperFormer": (17_694_720 + 432 * 144, 1_081_728, 17_694_720 + 432 * 144 + 3_456, 3_456, 2_211_840),
    "MHR, 64 heads": (17_694_720, 69_230_592, 17_694_720 + 221_184, 221_184, 2_211_840),
    "l-LoRA": (933_888, 0, 933_888, None, None),
    "l-LoRA-big": (14_942_208, 0, 14_942_208, None, None),
    "l-Poly": (7_471_104, 480_768, 7_471_104 + 1_536, 1_536, 933_888),
    "l-MHR, 32 heads": (7_471_104, 313 * 49_152, 7_471_104 + 49_152, 49_152, 933_888),
    "l-MHR, 64 heads": (7_471_104, 313 * 98_304, 7_471_104 + 98_304, 98_304, 933_888),
    "attention: LoRA-big": (18_874_368, 0, 18_874_368, None, None),
    "attention: MHR, 32 heads": (9_437_184, 313 * 73_728, 9_437_184 + 73_728, 73_728, 1_179_648),
    "attention: MHR, 64 heads": (9_437_184, 313 * 147_456, 9_437_184 + 147_456, 147_456, 1_179_648),
}


@pytest.mark.parametrize("name", XL)
def test_t5_xl(name):
    counts, keys = count("t5-xl", 313, **ROWS[name]), ("adapters", "Z", "all", "z", "mu")
    assert tuple(counts.get(key) for key in keys) == XL[name]


def test_t5_xxl():
    assert count("t5-xxl", 313, **ROWS["(IA)^3"])["all"] == 1_081_344
    assert count("t5-xxl", 1, **ROWS["MHR, 64 heads"])["z"] == 221_184


def test_bart_large():
    """Polytropon's skills: LoRA of rank 16 on self-attention, 3,145,728 parameters each."""
    counts = count("bart-large", 120, method="poly", rank=16, layers="self-attention")
    assert counts == {
        "adapters": 8 * 3_145_728, "Z": 120 * 8 * 96, "all": 8 * (3_145_728 + 96), "z": 8 * 96, "mu": 3_145_728,
    }  # fmt: skip
    cross = count("bart-large", 120, method="lora", rank=16, layers="attention")
    assert cross["all"] == 4_718_592  # the authors' older code adapts cross-attention too


def test_full_fine_tuning_then_lora():
    assert count("t5-xl", 1, method="full")["lora"] == 2_211_840


def test_hyperformer_on_bart_large():
    """The paper's 4l(2he + 2e)e, with rank 16 for the e in brackets, is 0.04 % more: its hidden layers are larger."""
    counts = count("bart-large", 120, method="hyperformer", rank=16, layers="self-attention")
    assert counts["adapters"] == 8 * 3_145_728 + 96 * 144 == 25_179_648
    assert 4 * 24 * (2 * 1024 * 16 + 2 * 16) * 8 == 25_190_400


SHOWN = {  # a row of docs/methods.md: its numbers, the papers' left out, in the order of its columns
    "Full; LoRA after it": ["full 0", "full 2", 2_211_840],
    "(IA)³": ["(IA)^3 0", "(IA)^3 2"],
    "LoRA": ["LoRA 0", "LoRA 2"],
    "LoRA-big, rank 16": ["LoRA-big 0", "LoRA-big 2"],
    "Private, AdapterSoup": ["Private, AdapterSoup 0", "Private, AdapterSoup 2"],
    "Random; Random-μ": ["Random 0", "Random 2", "Random 4"],
    "Poly": ["Poly 0", "Poly 1", "Poly 2"],
    "Poly-z, Poly-μ": ["Poly 3", "Poly 4"],
    "Poly of (IA)³; -z, -μ": [f"Poly (IA)^3 {k}" for k in range(5)],
    "MHR, 64 heads": [f"MHR, 64 heads {k}" for k in range(3)],
    "MHR-z, MHR-μ": ["MHR, 64 heads 3", "MHR, 64 heads 4"],
    "Task-MoE": [f"Task-MoE {k}" for k in range(3)],
    "HyperFormer": [f"HyperFormer {k}" for k in range(3)],
    "l-LoRA; rank 16": ["l-LoRA 0", "l-LoRA-big 0"],
    "l-Poly; -z": [f"l-Poly {k}" for k in range(4)],
    "l-MHR-z, 32 heads; 64": ["l-MHR, 32 heads 3", "l-MHR, 64 heads 3"],
    "`--layers attention`: LoRA, rank 16; MHR-z, 32 heads; 64": [
        "attention: LoRA-big 0", "attention: LoRA-big 2", "attention: MHR, 32 heads 3", "attention: MHR, 64 heads 3",
    ],
}  # fmt: skip


def test_the_readmes_table():
    """Every number of the table of docs/methods.md is the one that is counted for its row and column."""
    readme = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    section = readme.split("## What is trained, counted")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    shown = {row[0].strip(): re.findall(r"\d{1,3}(?:,\d{3})+", "|".join(row[1:4])) for row in rows}
    of = {f"{name} {k}": n for name, numbers in XL.items() for k, n in enumerate(numbers)}
    assert shown == {row: [f"{of.get(cell, cell):,}" for cell in cells] for row, cells in SHOWN.items()}


def test_the_table_shows_every_row(capsys, monkeypatch):
    few = ("LoRA", "MHR, 64 heads", "Poly SFT, 10 %")
    monkeypatch.setattr(count_parameters, "ROWS", {name: ROWS[name] for name in few})
    count_parameters.main(dict(backbone="bart-large", training_tasks=10))
    head, *lines = capsys.readouterr().out.splitlines()
    assert "Z of 10 tasks" in head and [line.split("  ")[0] for line in lines] == list(few)
    assert len({len(line) for line in (head, *lines)}) == 1
    monkeypatch.setattr(count_parameters, "ROWS", {"MHR": dict(method="mhr", heads=7)})
    count_parameters.main(dict(backbone="bart-large", training_tasks=10))
    assert capsys.readouterr().out.splitlines()[1].split()[2:] == ["-"] * 6  # 7 heads do not divide a layer


@pytest.mark.parametrize("name", [name for name in ROWS if "64 heads" not in name])  # they do not divide 32
def test_what_is_counted_is_what_a_run_of_so_many_tasks_trains(tmp_path, name):
    """`count` builds the model of one task and multiplies; the adapters of three tasks have as many."""
    small_config("t5").save_pretrained(tmp_path)
    settings = ROWS[name] | (dict(heads=8) if "heads" in ROWS[name] else {})
    counts = count(str(tmp_path), 3, **settings)
    model, cfg = meta_backbone(str(tmp_path), "cpu"), train.Config(**settings)
    cfg.skills = 3 if cfg.method == "private" else cfg.skills
    if cfg.method != "full":
        methods.add_adapters(model, cfg, 3)
    assert methods.count_parameters(model) == {"adapters": counts["adapters"], "routing": counts["Z"]}


def test_as_many_tasks_as_the_flag_allows():
    """2^31 - 1 of them are counted, not built."""
    assert count("t5-xl", 2**31 - 1, method="private")["adapters"] == (2**31 - 1) * 2_211_840
    assert count("t5-xl", 2**31 - 1, method="mhr", heads=64)["Z"] == (2**31 - 1) * 221_184


COMMANDS = (count_parameters.main, estimate_memory.main)
BROKEN = {  # what a config.json says: what the error says
    '"num_layers": 20000': "its num_layers is more than 10,000",
    '"d_model": 1e400': "Field 'd_model' expected int, got float",
    '"d_model": "many"': "Field 'd_model' expected int, got str",
    '"d_model": -5': "negative dimension -5",
    '"num_layers": 0, "num_decoder_layers": 0': "no layer's name matches",
    '"model_type": "bert"': "a bert model have no names here",
}


@pytest.mark.parametrize("settings", BROKEN)
def test_configs_of_which_no_model_can_be_made(tmp_path, settings):
    """Impossible numbers, texts for numbers, another family: one sentence that names the backbone, at once."""
    (tmp_path / "config.json").write_text('{"model_type": "t5", "decoder_start_token_id": 0, ' + settings + "}")
    for main in COMMANDS:
        with pytest.raises(UserError, match=f"--backbone {tmp_path}.*{BROKEN[settings]}") as refused:
            main(dict(backbone=str(tmp_path)))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "kind, says", [("phi", "--backbone .* phi model have no names"), ("vit", "a vit model is no language model")]
)
def test_backbones_that_cannot_be_counted(tmp_path, kind, says):
    """A language model whose layers have no names here, and a model of another kind: one sentence, not a table of -."""
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
    for main in COMMANDS:
        with pytest.raises(UserError, match=says):
            main(dict(backbone=str(tmp_path / kind)))


@pytest.mark.parametrize("name", ["no/such/folder", "t5-xxxl"])
def test_a_backbone_that_does_not_exist(name, monkeypatch):
    monkeypatch.setattr(count_parameters, "reach_hub", lambda: monkeypatch.setenv("HF_HUB_OFFLINE", "1"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"--backbone {name}: .* \(bundled: bart-large, qwen3-8b, t5-xl, t5-xxl\)"):
        meta_backbone(name)
