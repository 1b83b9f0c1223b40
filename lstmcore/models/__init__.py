"""Whole models: which LSTMs are inside, what runs them, and how they move over to ours and back."""

from lstmcore.models.explaining import explain
from lstmcore.models.installing import install, installed, uninstall
from lstmcore.models.patching import patch, unpatch
from lstmcore.models.report import Report

__all__ = ["Report", "explain", "install", "installed", "patch", "uninstall", "unpatch"]
