"""The shipped modelling file against the equations, evaluated in fp64 by a second, independent implementation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.model import ModelConfig
from moetrain.config.moe import MoEConfig
from moetrain.config.routers import ExpertBiasRouterConfig, TopKRouterConfig

Weights = dict[str, Tensor]
BUDGETS = ("mean_k", "paper")


# --- the equations, one token and one head at a time -----------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def swiglu(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    gate, up = (fc1 @ x).chunk(2)
    return fc2 @ (gate * torch.sigmoid(gate) * up)


def rope(vector: Tensor, position: int, base: float) -> Tensor:
    half = len(vector) // 2
    out = vector.clone()
    for n in range(half):
        angle = position * base ** (-2 * n / len(vector))
        a, b = vector[n], vector[n + half]
        out[n] = a * math.cos(angle) - b * math.sin(angle)
        out[n + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def statistic(kind: str, row: Tensor) -> float:
    """`row` holds the probabilities of the visible keys, the token itself last."""
    if kind == "self_weight":
        return float(row[-1])
    if kind == "row_max":
        return float(row.max())
    if len(row) == 1:
        return 0.0
    return float(-(row * row.log()).sum() / math.log(len(row)))


def with_normed_queries_and_keys(w: Weights, prefix: str, qkv: Tensor, model: ModelConfig) -> Tensor:
    """Head by head, or all heads of a projection as one vector."""
    width, per_group = model.head_dim, model.num_attention_heads // model.kv_heads
    at = {"q": [], "k": []}
    for head in range(model.num_attention_heads + 2 * model.kv_heads):
        place = head % (per_group + 2)
        if place <= per_group:
            at["q" if place < per_group else "k"].append(slice(head * width, (head + 1) * width))
    result = qkv.clone()
    for name, heads in at.items():
        weight = w[f"{prefix}{name}_layernorm.weight"]
        for token in range(len(qkv)):
            vectors = [qkv[token, head] for head in heads]
            if model.qk_layernorm == "projection":
                normed = list(rms_norm(torch.cat(vectors), weight, model.layernorm_epsilon).split(width))
            else:
                normed = [rms_norm(vector, weight, model.layernorm_epsilon) for vector in vectors]
            for head, vector in zip(heads, normed, strict=True):
                result[token, head] = vector
    return result


def attention(w: Weights, prefix: str, x: Tensor, model: ModelConfig, kind: str) -> tuple[Tensor, list[float]]:
    heads, groups, width = model.num_attention_heads, model.kv_heads, model.head_dim
    per_group = heads // groups
    qkv = x @ w[prefix + "linear_qkv.weight"].T
    if model.add_qkv_bias:
        qkv = qkv + w[prefix + "linear_qkv.bias"]
    if model.qk_layernorm is not None:
        qkv = with_normed_queries_and_keys(w, prefix, qkv, model)
    context, importance = torch.zeros(len(x), heads * width, dtype=x.dtype), []
    for token in range(len(x)):
        of_heads = []
        for head in range(heads):
            start = (head // per_group) * (per_group + 2) * width
            q_at, k_at, v_at = (
                start + (head % per_group) * width,
                start + per_group * width,
                start + (per_group + 1) * width,
            )
            q = rope(qkv[token, q_at : q_at + width], token, model.rotary_base)
            keys = torch.stack([rope(qkv[j, k_at : k_at + width], j, model.rotary_base) for j in range(token + 1)])
            row = (keys @ q / math.sqrt(width)).softmax(0)
            context[token, head * width : (head + 1) * width] = row @ qkv[: token + 1, v_at : v_at + width]
            of_heads.append(statistic(kind, row))
        importance.append(sum(of_heads) / heads)
    return context @ w[prefix + "linear_proj.weight"].T, importance


def budget(w: Weights, prefix: str, x: Tensor, importance: float, position: int, moe: MoEConfig) -> int:
    router = moe.router
    if not isinstance(router, DAMoERouterConfig):
        return router.top_k
    if router.importance == "predicted":
        importance = 1 / (1 + math.exp(-float(w[prefix + "router.predictor"] @ x)))
    if router.budget == "paper":
        return min(max(math.ceil(moe.num_experts * importance), router.min_k), router.max_k or moe.num_experts)
    debiased = router.debias == "position"
    if debiased and position == 0:
        return math.floor(router.mean_k + 0.5)
    rows = w[prefix + "router.thresholds"]
    row = rows[min((position + 1).bit_length() - 1, len(rows) - 1) if debiased else 0]
    if importance in (0.0, 1.0):
        odds = math.inf if importance else -math.inf
    else:
        odds = math.log(importance / (1 - importance))
    return router.min_k + sum((-odds if router.direction == "low" else odds) >= float(t) for t in row)


def generated_expert(
    w: Weights, prefix: str, x: Tensor, chosen: list[int], p: Tensor, layer: int, model: ModelConfig
) -> Tensor:
    hyper = model.moe.hyper

    def linear(name: str, value: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ value + w[f"{name}.bias"]

    if hyper.condition_on == "static":
        return linear(prefix + "up", linear(prefix + "down", x).relu())
    own = {"layer": prefix, "model": "selection_embedding."}[hyper.embeddings]
    if hyper.condition_on == "constant":
        condition = w[own + "constant"]
    else:
        used = [e for e in range(model.moe.num_experts) if (e in chosen) == (hyper.condition_on == "selected")]
        total = torch.zeros(hyper.expert_embedding, dtype=x.dtype)
        for e in used:
            share = {"sum": 1, "mean": 1 / len(used), "prob": p[e] / p[used].sum()}[hyper.aggregation]
            total = total + share * w[own + "expert_embedding"][e]
        condition = linear(own + "process_out", linear(own + "process_in", total).relu())
    size = model.num_layers // (hyper.stages or 1)
    network, row = {
        "model": ("hypernetwork.", layer),
        "stage": (f"hypernetworks.{layer // size}.", layer % size),
        "layer": (prefix + "network.", 0),
    }[hyper.sharing]
    if hyper.layer_embedding:
        condition = torch.cat((condition, w[network + "layer_embedding"][row]))
    code = linear(network + "input", condition).relu()
    down = linear(network + "down", code).view(hyper.bottleneck, -1)
    up = linear(network + "up", code).view(-1, hyper.bottleneck)
    return up @ (down @ x + linear(network + "down_bias", code)).relu() + linear(network + "up_bias", code)


def best_groups(worth: Tensor, router: TopKRouterConfig | ExpertBiasRouterConfig) -> list[int]:
    """Experts of the groups that a token may choose from."""
    size = len(worth) // router.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(router.groups)]
    counted = 1 if router.group_score == "max" else 2
    groups.sort(key=lambda group: -sum(sorted((float(worth[e]) for e in group), reverse=True)[:counted]))
    return [e for group in groups[: router.top_groups] for e in group]


def moe_token(
    w: Weights, prefix: str, x: Tensor, importance: float, position: int, layer: int, model: ModelConfig
) -> Tensor:
    moe = model.moe
    logits, router = w[prefix + "router.weight"] @ x, moe.router
    score = 1 / (1 + (-logits).exp()) if getattr(router, "scores", "softmax") == "sigmoid" else logits.softmax(0)
    worth = score + w.get(prefix + "router.bias", 0)
    visible = best_groups(worth, router) if getattr(router, "top_groups", None) else list(range(moe.num_experts))
    chosen = sorted(visible, key=lambda e: -worth[e])[: budget(w, prefix, x, importance, position, moe)]
    total = sum(score[e] for e in chosen) if router.gates == "renormalized" else 1.0
    factor, p = getattr(router, "scaling_factor", 1.0), score / score.sum()
    y = torch.zeros_like(x)
    for e in chosen:
        y += factor * score[e] / total * swiglu(x, w[prefix + "experts.fc1"][e], w[prefix + "experts.fc2"][e])
    if moe.shared_expert_ffn_hidden_size is not None:
        y += swiglu(x, w[prefix + "shared_expert.fc1"], w[prefix + "shared_expert.fc2"])
    if moe.hyper is not None:
        gated = moe.hyper.coefficient == "selected_probability"
        y += generated_expert(w, prefix + "hyper.", x, chosen, p, layer, model) * (p[chosen].sum() if gated else 1)
    return y


def reference_forward(weights: Weights, model: ModelConfig, tokens: list[int]) -> Tensor:
    """Logits [s, V], fp64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x, eps = w["embedding.word_embeddings.weight"][tokens], model.layernorm_epsilon
    kind = getattr(model.moe.router, "importance", "self_weight") if model.moe else "self_weight"
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}."
        normed = rms_norm(x, w[prefix + "input_layernorm.weight"], eps)
        attended, importance = attention(w, prefix + "self_attention.", normed, model, kind)
        x = x + attended
        normed = rms_norm(x, w[prefix + "pre_mlp_layernorm.weight"], eps)
        prefix += "mlp."
        if model.is_moe_layer(layer):
            rows = [
                moe_token(w, prefix, t, i, position, layer, model)
                for position, (t, i) in enumerate(zip(normed, importance, strict=True))
            ]
        else:
            rows = [swiglu(t, w[prefix + "linear_fc1.weight"], w[prefix + "linear_fc2.weight"]) for t in normed]
        x = x + torch.stack(rows)
    head = w["embedding.word_embeddings.weight" if model.share_embeddings_and_output_weights else "output_layer.weight"]
    return rms_norm(x, w["decoder.final_layernorm.weight"], eps) @ head.T


# --- the tests -------------------------------------------------------------------------------------------------------


def some_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(7))


def test_logits_are_those_of_the_equations(model, weights, build):
    tensors, tokens = weights(model), some_tokens(2, 7)
    with torch.no_grad():
        logits = build(model, tensors)(tokens).logits
    expected = torch.stack([reference_forward(tensors, model, row.tolist()) for row in tokens])
    assert expected.std() > 0.3
    torch.testing.assert_close(logits.double(), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    "kind",
    [
        *(f"{importance}-{budget}" for importance in ("self_weight", "row_max", "row_entropy") for budget in BUDGETS),
        *("low", "debiased", "predicted", "predicted-debiased-low"),
    ],
)
def test_da_moe_cases_cover_several_numbers_of_experts(of_kind, weights, build, kind):
    """Otherwise the comparison with the equations would say nothing about budgets."""
    model = of_kind(f"da_moe-{kind}")
    network, counts = build(model, weights(model)), set()
    for layer in network.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: counts.update(out[1].sum(-1).tolist()))
    with torch.no_grad():
        network(some_tokens(2, 7))
    assert len(counts) > 1


def test_cached_decoding_gives_the_logits_of_a_full_forward(model, weights, build):
    network, tokens = build(model, weights(model)), some_tokens(2, 9)
    with torch.no_grad():
        full = network(tokens, use_cache=False).logits
        step = network(tokens[:, :4], use_cache=True)
        pieces, cache = [step.logits], step.past_key_values
        for piece in (tokens[:, 4:5], tokens[:, 5:8], tokens[:, 8:]):
            pieces.append(network(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=2e-5, rtol=0)


def test_left_padding_changes_no_logit(model, weights, build):
    network, tokens = build(model, weights(model)), some_tokens(1, 6)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), tokens), dim=1)
    mask = torch.cat((torch.zeros(1, 3, dtype=torch.long), torch.ones_like(tokens)), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(
            network(padded, attention_mask=mask).logits[:, 3:], network(tokens).logits, atol=2e-5, rtol=0
        )


def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(model, weights, build):
    network, tokens = build(model, weights(model)), some_tokens(3, 6)
    mask = torch.ones_like(tokens)
    mask[0, :4], mask[1, :1] = 0, 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = network.generate(tokens, attention_mask=mask, **options)[:, 6:]
    for row in range(3):
        prompt = tokens[row : row + 1, mask[row].bool()]
        alone = network.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, prompt.shape[1] :]
        assert alone.tolist() == together[row : row + 1].tolist()


@pytest.mark.parametrize("kind", ["top_k-hyper", "da_moe-self_weight-mean_k", "da_moe-row_entropy-paper"])
@pytest.mark.parametrize("padded", [False, True])
def test_static_cache_and_beams_generate_like_the_plain_loop(of_kind, weights, build, kind, padded):
    model = of_kind(kind)
    network, tokens = build(model, weights(model)), some_tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]) if padded else torch.ones_like(tokens)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = network.generate(tokens, **options)
    static = network.generate(tokens, cache_implementation="static", disable_compile=True, **options)
    assert static.tolist() == plain.tolist()
    cached = network.generate(tokens, num_beams=3, **options)
    assert cached.tolist() == network.generate(tokens, num_beams=3, use_cache=False, **options).tolist()


def test_the_future_leaves_earlier_logits_alone(model, weights, build):
    network, tokens = build(model, weights(model)), some_tokens(2, 8)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 11) % 50
    with torch.no_grad():
        before, after = network(tokens).logits, network(changed).logits
    torch.testing.assert_close(after[:, :5], before[:, :5], atol=1e-5, rtol=0)
    assert (after[:, 5:] - before[:, 5:]).abs().max() > 1e-2


def test_importance_in_blocks_of_rows_equals_importance_at_once(of_kind, weights, build, monkeypatch):
    from moetrain.convert.hf_modeling import modeling_moetrain

    model = of_kind("da_moe-row_entropy-mean_k")
    network, tokens = build(model, weights(model)), some_tokens(2, 9)
    with torch.no_grad():
        whole = network(tokens).logits
        monkeypatch.setattr(modeling_moetrain, "ROWS_AT_ONCE", 2)
        torch.testing.assert_close(network(tokens).logits, whole, atol=1e-5, rtol=0)


def test_loss_is_the_shifted_cross_entropy_and_ignores_minus_100(of_kind, weights, build):
    model = of_kind("da_moe-hyper")
    network, tokens = build(model, weights(model)), some_tokens(2, 6)
    labels = tokens.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        output = network(tokens, labels=labels)
    logp = output.logits[:, :-1].double().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert output.loss.item() == pytest.approx(-logp[labels[:, 1:] != -100].mean().item(), abs=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(of_kind, weights, build):
    model = of_kind("da_moe-hyper")
    tokens, grads = some_tokens(2, 6), []
    for checkpointing in (False, True):
        network = build(model, weights(model)).train()
        if checkpointing:
            network.gradient_checkpointing_enable()
        network(tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in network.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dense-tied", "top_k-hyper", "da_moe-hyper", "da_moe-row_entropy-paper"])
def test_half_precision_runs_and_stays_near_fp32(of_kind, weights, build, kind, dtype):
    model, tokens = of_kind(kind), some_tokens(2, 6)
    with torch.no_grad():
        exact = build(model, weights(model))(tokens).logits
        logits = build(model, weights(model)).to(dtype)(tokens).logits
    assert logits.dtype == dtype
    assert (logits.float() - exact).abs().median() < 0.1 * exact.std()


def test_a_change_of_dtype_leaves_thresholds_exact(of_kind, weights, build):
    model = of_kind("da_moe-self_weight-mean_k")
    tensors = weights(model)
    router = build(model, tensors).half().bfloat16().to("cpu").model.layers[1].mlp.gate
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.thresholds, tensors["decoder.layers.1.mlp.router.thresholds"])


def test_logits_to_keep_hidden_states_and_embeddings_as_input(of_kind, weights, build):
    model = of_kind("top_k-hyper")
    network, tokens = build(model, weights(model)), some_tokens(2, 6)
    with torch.no_grad():
        full = network(tokens, output_hidden_states=True)
        last = network(inputs_embeds=network.get_input_embeddings()(tokens), logits_to_keep=2, return_dict=False)
    assert len(full.hidden_states) == model.num_layers + 1
    torch.testing.assert_close(network.lm_head(full.hidden_states[-1]), full.logits)
    torch.testing.assert_close(last[0], full.logits[:, -2:], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "output_attentions": True}, "output_attentions"),
        (
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 3)},
            "cached \\+ new tokens",
        ),
    ],
)
def test_calls_that_cannot_be_honored_say_so(of_kind, weights, build, arguments, message):
    model = of_kind("dense")
    with pytest.raises(ValueError, match=message):
        build(model, weights(model))(**arguments)


@pytest.mark.parametrize(
    "setting", [{"router_type": "hash"}, {"importance": "col_max"}, {"moe_layers": [1]}, {"max_k": 9}]
)
def test_a_configuration_that_the_model_cannot_honor_is_refused(setting):
    from moetrain.convert.hf_modeling.configuration_moetrain import MoetrainConfig

    with pytest.raises(ValueError, match=next(iter(setting)) if "max_k" not in setting else "9 experts"):
        MoetrainConfig(**({"router_type": "da_moe", "moe_layers": [1] * 12} | setting))
