"""Dynamics, adapters and validation: a trained potential in motion."""
