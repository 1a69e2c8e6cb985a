"""Weights that do not fit on the device: they stay in host memory and stream in ahead of use.

`choice` says which layers, `weights` moves them while a model is loaded, `streaming` copies them to the device in time,
and `device` is the little that both need of a device.
"""
