"""Tensor operations that know nothing of models: each fast form beside its readable definition."""
