"""The parts of bench/gpu_suite.py. Each runs in a process of its own: ``work(run)`` with a
`report.Run`.
"""
