"""What settings exist: their dotted paths, read off the schema, and the nearest one to a misspelled path."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

from moetrain.config.schema import RunConfig

# What people who come from Megatron-LM or DeepSpeed type first, where the name differs from ours.
FAMILIAR_NAMES = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "expert_model_parallel_size": "parallel.expert",
    "sequence_parallel": "parallel.sequence",
    "moe_router_topk": "model.moe.router.top_k",
    "moe_ffn_hidden_size": "model.moe.ffn_hidden_size",
    "moe_layer_freq": "model.moe.layer_freq",
    "moe_aux_loss_coeff": "model.moe.aux_loss_coeff",
    "moe_z_loss_coeff": "model.moe.z_loss_coeff",
    **{
        name: f"model.multi_latent_attention.{name}"
        for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    },
    "qk_nope_head_dim": "model.multi_latent_attention.qk_head_dim",
    "qk_rope_head_dim": "model.multi_latent_attention.qk_pos_emb_head_dim",
    "lr_decay_style": "optimizer.schedule.type",
    "lr_warmup_iters": "optimizer.schedule.warmup_iters",
    "gradient_clipping": "optimizer.clip_grad",
    "zero_stage": "zero.stage",
    "exit_interval": "training.stop_after",
    "bf16": "training.precision",
}


@cache
def setting_paths() -> tuple[str, ...]:
    """Every dotted path that a config may hold, sections included; list items are written `*`."""
    return tuple(dict.fromkeys(".".join(path) for path, _ in _walk(RunConfig, ())))


@cache
def variant_paths() -> frozenset[tuple[str, ...]]:
    """Paths of the sections that come in several kinds, told apart by their `type`."""
    return frozenset(path for path, kinds in _walk(RunConfig, ()) if len(kinds) > 1)


def variant_types(path: tuple[str, ...]) -> list[str]:
    """The legal values of `type` in a section of `variant_paths`."""
    kinds = next(kinds for known, kinds in _walk(RunConfig, ()) if known == path)
    return [kind.model_fields["type"].default for kind in kinds]


def children_of(section: str) -> list[str]:
    """The settings directly inside a section, as their last names."""
    prefix = f"{section}." if section else ""
    return [p[len(prefix) :] for p in setting_paths() if p.startswith(prefix) and "." not in p[len(prefix) :]]


def nearest_setting(path: str) -> str | None:
    """The known path that an unknown one most probably means, or None when nothing is near.

    A sibling with a nearly equal name comes first, then a setting of that name elsewhere in the tree. `path` writes
    list items as `*`, as `setting_paths` does.
    """
    section, _, name = path.rpartition(".")
    if name in FAMILIAR_NAMES:
        return FAMILIAR_NAMES[name]

    def cost(known: str) -> tuple[int, int]:
        known_section, _, known_name = known.rpartition(".")
        away = 0 if known_section == section else 1
        return edit_distance(name, known_name) + away, edit_distance(path, known)

    best = min((known for known in setting_paths() if not known.endswith("*")), key=cost)
    return best if cost(best)[0] <= 1 + len(name) // 4 else None


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that turn `left` into `right`."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row = row, [i]
        for j, b in enumerate(right, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def _walk(section: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[type[BaseModel]]]]:
    """Each setting's path below `prefix`, and the section kinds that may stand there (none for a plain value)."""
    for name, field in section.model_fields.items():
        path = (*prefix, name)
        kinds, item_kinds = _sections_in(field.annotation)
        yield path, kinds
        for kind in kinds:
            yield from _walk(kind, path)
        for kind in item_kinds:
            yield (*path, "*"), []
            yield from _walk(kind, (*path, "*"))


def _sections_in(annotation: Any) -> tuple[list[type[BaseModel]], list[type[BaseModel]]]:
    """The sections that an annotation allows: directly, and as items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation], []
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return [], _sections_in(arguments[0])[0]
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        found = [_sections_in(argument) for argument in arguments]
        return [k for direct, _ in found for k in direct], [k for _, items in found for k in items]
    return [], []
