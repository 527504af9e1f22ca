"""The documentation leads where it says, and its generated and tabulated parts are those of the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.loader import config_from_dict
from moetrain.config.model import ModelConfig
from moetrain.config.registry import setting_paths
from moetrain.config.size import parameter_shapes

from .reading import ROOT, anchors, console_commands, links, pages, rows, split_fences

PAGES = pages()
DOCS = ROOT / "docs"


def broken_links(page: Path, top: Path = ROOT) -> list[str]:
    """Relative links of a page that leave `top`, lead nowhere, or name a heading that is not there."""
    broken = []
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(top) or not target.exists() or (anchor and not has_anchor(target, anchor)):
            broken.append(link)
    return broken


def has_anchor(target: Path, anchor: str) -> bool:
    return target.suffix == ".md" and anchor in anchors(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_relative_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    assert broken_links(ROOT / page) == []


def test_a_dead_link_and_a_dead_anchor_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# Some heading: `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#some-heading-code) [c](gone.md) [d](there.md#gone) `[e](in-code.md)` [f](#own)\n"
        "\n```\n[g](in-a-block.md)\n```\n[`h`](gone-too.md) [i](../outside.md) [j](https://example.org/x)\n"
    )
    assert broken_links(page, tmp_path) == ["gone.md", "there.md#gone", "#own", "gone-too.md", "../outside.md"]


def test_every_page_of_docs_is_reached_from_the_index() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    reached = {(DOCS / link.partition("#")[0]).resolve() for link in links(index)}
    missing = [str(page) for page in PAGES if page.parts[0] == "docs" and (ROOT / page) not in reached]
    assert missing == ["docs/index.md"]


@pytest.mark.parametrize("page", [p for p in PAGES if p.parts[0] == "docs" or len(p.parts) == 1], ids=str)
def test_files_named_in_text_are_there(page: Path) -> None:
    """A path in `code` that begins with a folder of ours is a promise, too; `{}*<` mark patterns."""
    text = split_fences((ROOT / page).read_text(encoding="utf-8"))[0]
    ours = "moetrain|tests|docs|csrc|configs|slurm"
    named = re.findall(rf"`((?:{ours})/[\w./-]+\.(?:py|md|yaml|cpp|cu|j2|sh))`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def identifiers(text: str) -> set[str]:
    """What stands in `code` and looks like a name of a program: snake_case or CamelCase, perhaps dotted or called."""
    found = re.findall(r"`([A-Za-z_][\w.]*\w)(?:\([^`]*\))?`", split_fences(text)[0])
    return {name.rpartition(".")[2] for name in found if re.search(r"_|[a-z][A-Z]", name)}


# Names of other projects that a page speaks about and that our sources do not hold.
FOREIGN = {
    "docs/adr/0001-zero-seam.md": "BF16_Optimizer DeepSpeedEngine NoneType PipelineModule finalize_model_grads",
    "docs/adr/0002-checkpoint-format.md": "gather_object read_metadata scatter_object_list",
    "docs/adr/0003-own-dispatch-and-experts.md": "te_general_gemm",
    "docs/adr/0004-encoder-decoder.md": "CrossAttention RotaryEmbedding TransformerBlock decoder_seq_length "
    "encoder_and_decoder get_model_xattn get_tensor_shapes set_input_tensor xattn_needed",
    "docs/adr/0005-no-deepspeed-universal.md": "EP_NUM_EXPERTS PARAMETER_WITH_SUB_PARAMS _resolve_autoep_partition "
    "load_checkpoint load_universal_checkpoint",
    "docs/concepts/hypermoe.md": "use_fast_mode",
}


def test_names_of_code_in_text_are_names_in_the_code() -> None:
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".j2", ".sh", ".toml"}
    files = [p for folder in ("moetrain", "csrc", "tests", "slurm") for p in (ROOT / folder).rglob("*")]
    files = [p for p in [*files, ROOT / "pyproject.toml"] if p.suffix in suffixes and p != Path(__file__)]
    words = set(re.findall(r"\w+", "\n".join(p.read_text(encoding="utf-8") for p in files)))
    unknown = {str(p): identifiers((ROOT / p).read_text(encoding="utf-8")) - words for p in PAGES}
    assert {page: " ".join(sorted(names)) for page, names in unknown.items() if names} == FOREIGN


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_page_is_what_the_generator_writes() -> None:
    generator = load(DOCS / "generate_config_reference.py")
    written = generator.TARGET.read_text(encoding="utf-8")
    assert written == generator.config_reference(), "run: python docs/generate_config_reference.py"


def test_the_settings_page_has_every_setting() -> None:
    text = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    documented: set[str] = set()
    section = ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").partition(",")[0].replace("[]", ".*")
            documented |= {section, section.removesuffix(".*")}
        elif found := re.match(r"\| `(\w+)` \|", line):
            documented.add(f"{section}.{found[1]}")
    assert documented == set(setting_paths())


def model_of(tied: bool) -> dict[str, Any]:
    """A model whose sizes all differ, so that no two letters of the page can be confused."""
    hyper = {
        "expert_embedding": 29,
        "process": 31,
        "condition": 37,
        "layer_embedding": 41,
        "hidden": 43,
        "bottleneck": 47,
    }
    return {
        "num_layers": 2,
        "hidden_size": 12 * 14,
        "num_attention_heads": 12,
        "num_query_groups": 3,
        "ffn_hidden_size": 53,
        "vocab_size": 59,
        "seq_length": 8,
        "share_embeddings_and_output_weights": tied,
        "moe": {"num_experts": 61, "ffn_hidden_size": 67, "layer_freq": 2, "hyper": hyper},
    }


LETTERS = {
    "d": 168, "V": 59, "L": 2, "H": 12, "G": 3, "hd": 14, "F": 53, "E": 61, "f": 67, "t": 29, "q": 31, "c": 37, "m": 41,
    "h": 43, "r": 47,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_the_names_page_has_every_parameter_with_its_shape(tied: bool) -> None:
    tree = {
        "run": {"dir": "unused"},
        "model": model_of(tied),
        "data": {"tokenizer": {"path": "unused"}, "train": [{"path": "unused"}]},
        "training": {"train_iters": 1, "global_batch_size": 1},
    }
    shapes = parameter_shapes(config_from_dict(tree, "test").model)
    real = {re.sub(r"layers\.\d+", "layers.{i}", name): shape for name, shape in shapes}
    page = (DOCS / "reference" / "names.md").read_text(encoding="utf-8")
    told = {}
    for name, shape, _ in rows(page, 3):
        if name.startswith("`") and shape.startswith("`("):
            told[name.strip("`")] = eval(shape.strip("`"), {"__builtins__": {}}, LETTERS)
    if tied:
        assert told.pop("output_layer.weight") == (59, 168)
    assert told == real


def test_the_page_of_names_has_the_parameters_of_latent_attention() -> None:
    page = (DOCS / "reference" / "names.md").read_text(encoding="utf-8")
    told = {
        name.strip("`"): shape.replace("`", "") for name, shape, _ in rows(page, 3) if shape.startswith("(") and name
    }
    sizes = {"q_lora_rank": 7, "kv_lora_rank": 11, "n": 13, "r": 4, "v": 17, "d": 19, "H": 3}
    latent = {"kv_lora_rank": 11, "qk_head_dim": 13, "qk_pos_emb_head_dim": 4, "v_head_dim": 17}
    real: dict[str, tuple[int, ...]] = {}
    for choice in ({}, {"q_lora_rank": 7}):
        model = {"num_layers": 1, "hidden_size": 19, "num_attention_heads": 3, "ffn_hidden_size": 5, "vocab_size": 5}
        model |= {"seq_length": 5, "multi_latent_attention": latent | choice}
        shapes = parameter_shapes(ModelConfig.model_validate(model))
        prefix = "decoder.layers.0.self_attention."
        real |= {name.removeprefix(prefix): shape for name, shape in shapes if name.startswith(prefix)}
    assert {name: eval(shape, {"__builtins__": {}}, sizes) for name, shape in told.items()} == real


def test_the_zero_seams_list_of_internals_is_used_and_is_deepspeeds() -> None:
    page = (DOCS / "adr" / "0001-zero-seam.md").read_text(encoding="utf-8")
    table = page.partition("| internal of `DeepSpeedZeroOptimizer` |")[2]
    names = {name for internals, _ in rows(table, 2) for name in re.findall(r"`(\w+)`", internals)}
    ours = (ROOT / "moetrain" / "optim" / "zero.py").read_text(encoding="utf-8")
    package = importlib.util.find_spec("deepspeed")
    assert package is not None and package.origin is not None
    theirs = (Path(package.origin).parent / "runtime" / "zero" / "stage_1_and_2.py").read_text(encoding="utf-8")
    assert len(names) > 10
    assert [name for name in sorted(names) if name not in ours or name not in theirs] == []
    public = {"optimizer", "step", "zero_grad"}
    used = {name for name in re.findall(r"self\._zero\.(\w+)", ours) if not name.startswith("moetrain_")}
    assert used - public <= names, "an internal that moetrain uses is not in the list"


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = {words[1] for words in console_commands(text) if words[0] == "make"}
        named |= set(re.findall(r"`make ([a-z-]+)", text))
        assert named <= targets, f"{page} names make targets that the Makefile lacks"
