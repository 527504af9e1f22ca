"""The decoder: Megatron-core's GPTModel with our attention core, norm and MoE layer in its slots."""
