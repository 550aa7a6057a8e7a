"""How is it trained? The loop and what it stands on; only `runtime` knows of Accelerate."""
