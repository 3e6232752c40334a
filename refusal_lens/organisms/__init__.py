"""Small trained models whose true answer is known by construction, and what trains them."""
