"""The README.md of an export: what was trained, how, from which step, and how to load it."""

from __future__ import annotations

from pathlib import Path

from moetrain.config.routers import DAMoERouterConfig
from moetrain.config.schema import HyperConfig, ModelConfig, RunConfig

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- moetrain
{tags}---

# {name}

{summary}

| | |
|---|---|
| parameters | {parameters:,} |
| layers x width | {layers} x {width} |
| attention heads (key/value) | {heads} ({kv_heads}) |
| vocabulary | {vocabulary:,} |
| context in training | {context:,} tokens |
| dtype of this export | {dtype} |

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
"""
_TRAINED = """\
Pretrained with moetrain for {step:,} of {planned:,} steps of {batch:,} sequences of {context:,} tokens; it has seen
{tokens:,} tokens. {precision} with fp32 masters, AdamW, peak learning rate {lr:g} ({schedule}), weight decay {decay:g},
gradient norm clipped at {clip:g}, seed {seed}. Data: {data}.

It is a base model: it continues text, and has been taught neither to follow instructions nor to avoid harmful output.
"""
_NOT_TRAINED = "Weights that moetrain was given, in another form; it has made no training step on them.\n"
_OWN_CODE = """\
`trust_remote_code=True` runs the two Python files of this folder; they need torch and transformers (4.57 or newer)."""
_STOCK_CODE = "transformers has the architecture itself; the folder holds no code."


def model_card(config: RunConfig, step: int, samples: int, parameters: int, dtype: str, own_code: bool = True) -> str:
    """Markdown with a metadata header. `own_code`: the folder has modelling files. Corpora appear by file name only, so
    no path of the training machine leaks."""
    model = config.model
    return _TEMPLATE.format(
        tags="- mixture-of-experts\n" if model.moe is not None else "",
        name=config.run.name,
        summary=_summary(model),
        parameters=parameters,
        layers=model.num_layers,
        width=model.hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.kv_heads,
        vocabulary=model.vocab_size,
        context=model.seq_length,
        dtype=dtype,
        training=_training(config, step, samples) if step else _NOT_TRAINED,
        trust=", trust_remote_code=True" if own_code else "",
        code=_OWN_CODE if own_code else _STOCK_CODE,
    )


def _training(config: RunConfig, step: int, samples: int) -> str:
    train, optimizer, length = config.training, config.optimizer, config.model.seq_length
    return _TRAINED.format(
        step=step,
        planned=train.train_iters,
        batch=train.global_batch_size,
        context=length,
        tokens=samples * length,
        precision=train.precision,
        lr=optimizer.lr,
        schedule=optimizer.schedule.type,
        decay=optimizer.weight_decay,
        clip=optimizer.clip_grad,
        seed=train.seed,
        data=", ".join(f"{Path(corpus.path).name} (weight {corpus.weight:g})" for corpus in config.data.train),
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
