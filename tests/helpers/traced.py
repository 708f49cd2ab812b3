"""Tracing, which torch calls deprecated and people use."""

import warnings

import torch


def traced(function, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, inputs)
