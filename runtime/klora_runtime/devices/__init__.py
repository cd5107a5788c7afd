"""Device-specific behaviour: one record per type of device, names, free memory, precision.

This is the only room that names a type of device; every other room may use it. `device_types` has
the records, `names` parses device names, `host_memory` measures free host memory, and `precision`
finds a device with float64 and keeps float32 products exact. A new device is a new record.
"""
