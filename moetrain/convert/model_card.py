"""The README.md of an export: what the model is, what was trained and how, how to load it, and where its limits are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.model import ModelConfig
from moetrain.config.moe import HyperConfig
from moetrain.config.size import parameter_count
from moetrain.convert.training_record import FILE, TrainingRecord

_TEMPLATE = """\
---
# license: to be chosen by whoever publishes the model (https://huggingface.co/docs/hub/repositories-licenses)
# language and datasets: likewise
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

{summary}

| | |
|---|---|
{table}

## Training

{training}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
prompt = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

{code}

To train on with moetrain, on any parallel layout and with a fresh optimizer:

```bash
moetrain convert from-hf path/to/this/folder imported
```

## Limits

{limits}

## License

None is stated: choose one, and name it as `license:` in the header of this file.
"""
_TRAINED = """\
Pretrained with moetrain for {step:,} of {planned:,} steps of {batch:,} sequences of {context:,} tokens; it has seen
{tokens:,} tokens.{start}

{facts}

<details>
<summary>Settings that are no defaults</summary>

```yaml
{settings}
```

</details>

The same facts for programs: `{file}`.
"""
_NOT_TRAINED = "Weights that moetrain was given, in another form; it has made no training step on them.\n"
_OWN_CODE = """\
`trust_remote_code=True` runs the two Python files of this folder; they need torch and transformers (4.57 or newer)."""
_STOCK_CODE = "transformers has the architecture itself; the folder holds no code."


def model_card(name: str, model: ModelConfig, record: TrainingRecord | None, dtype: str, own_code: bool = True) -> str:
    """Markdown with a metadata header. `record`: None if nothing was trained; `own_code`: the folder has modelling
    files."""
    return _TEMPLATE.format(
        tags="\n".join(f"- {tag}" for tag in _tags(model, own_code)),
        name=_plain(name),
        summary=_summary(model),
        table="\n".join(f"| {what} | {value} |" for what, value in _size(model, dtype)),
        training=_training(record) if record is not None else _NOT_TRAINED,
        trust=", trust_remote_code=True" if own_code else "",
        code=_OWN_CODE if own_code else _STOCK_CODE,
        limits="\n".join(f"- {limit}" for limit in _limits(model)),
    )


def _tags(model: ModelConfig, own_code: bool) -> Iterator[str]:
    yield "moetrain"
    if model.moe is not None:
        yield "mixture-of-experts"
        if isinstance(model.moe.router, DAMoERouterConfig):
            yield "da-moe"
        if model.moe.hyper is not None:
            yield "hypermoe"
    if own_code:
        yield "custom_code"


def _size(model: ModelConfig, dtype: str) -> Iterator[tuple[str, str]]:
    count = parameter_count(model)
    yield "parameters", f"{count.total:,}"
    if model.moe is not None:
        bound = "about " if model.moe.router.expected_mean_k(model.moe.num_choices) < model.moe.max_top_k else ""
        yield "of them at work on a token", f"{bound}{count.active_per_token:,}"
    yield "layers x width", f"{model.num_layers} x {model.hidden_size}"
    yield "attention heads (key/value)", f"{model.num_attention_heads} ({model.kv_heads}), {model.head_dim} wide"
    yield "vocabulary", f"{model.vocab_size:,}"
    yield "context in training", f"{model.seq_length:,} tokens"
    yield "dtype of this export", dtype


# --- the training ---------------------------------------------------------------------------------------------------


def _training(record: TrainingRecord) -> str:
    start = f" It began with the weights of {_code(record.started_from)}." if record.started_from is not None else ""
    return _TRAINED.format(
        step=record.step,
        planned=record.planned_steps,
        batch=record.global_batch_size,
        context=record.sequence_length,
        tokens=record.sequences * record.sequence_length,
        start=start,
        facts="\n".join(f"- **{what}**: {told}" for what, told in _facts(record)),
        settings="\n".join(f"{_word(name)}: {json.dumps(value)}" for name, value in record.settings.items()),
        file=FILE,
    )


def _facts(record: TrainingRecord) -> Iterator[tuple[str, str]]:
    yield "data", ", ".join(f"{_code(corpus.name)} (weight {corpus.weight:g})" for corpus in record.data)
    clip = f"gradient norm clipped at {record.clip_grad:g}" if record.clip_grad else "gradients not clipped"
    yield (
        "optimizer",
        f"AdamW on fp32 masters, peak learning rate {record.learning_rate:g} ({_plain(record.schedule)}), weight "
        f"decay {record.weight_decay:g}, {clip}; {_plain(record.precision)}, seed {record.seed}",
    )
    layout = "not recorded" if record.layout is None else _plain(record.layout)
    yield "layout", f"{layout}; ZeRO-{record.zero_stage}"
    yield "loss", "; ".join(_losses(record)) or "not recorded"
    if record.skipped_steps:
        yield "skipped steps", f"{record.skipped_steps:,}, whose gradients were not finite"
    versions = ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in record.versions.items())
    yield "software", versions or "not recorded"


def _losses(record: TrainingRecord) -> Iterator[str]:
    if record.loss is not None:
        yield f"{record.loss:.4f} nats per token on the last step's batch"
    if record.validation is not None:
        yield f"{record.validation.loss:.4f} on validation data after step {record.validation.iteration:,}"


# --- the model ------------------------------------------------------------------------------------------------------


def _limits(model: ModelConfig) -> Iterator[str]:
    yield (
        "A base model: it continues text, and has been taught neither to follow instructions nor to avoid harmful or "
        "false output."
    )
    yield "It reproduces the biases of its data. Beyond what is told above it has not been evaluated."
    yield f"It has never seen more than {model.seq_length:,} tokens at once; beyond that its output is untested."
    if model.moe is not None and isinstance(model.moe.router, DAMoERouterConfig) and model.moe.router.has_thresholds:
        yield (
            "The number of experts per token follows thresholds that stand still since training: on text of another "
            "kind its mean may differ from the one above."
        )


def _summary(model: ModelConfig) -> str:
    if model.moe is None:
        return "A dense causal decoder (RMSNorm, rotary positions, grouped-query attention, SwiGLU)."
    moe, router = model.moe, model.moe.router
    sparse = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))
    if isinstance(router, DAMoERouterConfig):
        routing = (
            f"Dynamic routing (DA-MoE, arXiv 2409.06669): a token gets at least {router.min_k} of the experts: "
            f"{router.describe(moe.num_experts)}."
        )
    else:
        routing = f"Experts of a token: {router.describe(moe.num_experts)}."
    hyper = _hyper_sentence(moe.hyper) if moe.hyper is not None else ""
    return (
        f"A causal decoder with {moe.num_experts} experts in {sparse} of its {model.num_layers} layers "
        f"(RMSNorm, rotary positions, grouped-query attention, SwiGLU). {routing}{hyper}"
    )


def _hyper_sentence(hyper: HyperConfig) -> str:
    if hyper.condition_on == "static":
        return " Each of these layers adds a small branch of its own."
    source = {"unselected": "the unselected ones", "selected": "the selected ones", "constant": "a learned vector"}
    owner = {"model": "A shared hypernetwork", "stage": "A hypernetwork for each group of layers"}
    return (
        f" {owner.get(hyper.sharing, 'A hypernetwork for each of these layers')} adds an expert generated from "
        f"{source[hyper.condition_on]} (HyperMoE, arXiv 2402.12656)."
    )


# --- words of others, who may mean no good ---------------------------------------------------------------------------


def _plain(text: str) -> str:
    """One line without markup."""
    return re.sub(r"([\\`*\[\]<>#|&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """One line as code, where nothing is markup."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _word(text: str) -> str:
    """The name of a setting in a block of code."""
    return re.sub(r"[^\w.]", "_", text)
