"""The two files that every Hugging Face export carries. They import torch and transformers, and nothing of moetrain."""
