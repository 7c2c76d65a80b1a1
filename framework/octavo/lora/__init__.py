"""LoRA adapters as plain data: how a request names one, and what is known of one. No torch here."""
