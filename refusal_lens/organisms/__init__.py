"""Model organisms: small trained models with known ground truth, and their training code."""
