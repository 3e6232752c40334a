"""Text to tokens: contrasts, files of prompts, protocols, chat templates."""
