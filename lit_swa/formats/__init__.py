"""What files hold: checkpoints, safetensors, Hugging Face, GGUF, PEFT, tokenizers, chat templates, downloads."""
