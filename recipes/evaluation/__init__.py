"""The evidence kit: what adapters decode, how good and how diverse that is, and what the hypotheses have become."""
