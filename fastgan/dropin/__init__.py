"""The drop-in layer: an existing model or trainer runs on fastgan's kernels, with its parameters, names and checkpoints."""

from fastgan.dropin.accelerate import accelerate as accelerate
from fastgan.dropin.accelerate import restore as restore
from fastgan.dropin.audit import audit as audit
from fastgan.dropin.findings import Finding as Finding
from fastgan.dropin.report import Report as Report
