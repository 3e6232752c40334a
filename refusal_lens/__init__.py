"""Is the direction along which a chat model refuses its own mechanism, or just negativity?"""
