"""What differs from device to device: one record per type, names, free memory, precision.

Every room may ask here, and nothing else of klora names a type of device. `device_types` has the
records, `names` turns what a user says into a device, `host_memory` tells what the host can give,
and `precision` says where float64 is and keeps float32 products full. A new device is a new record.
"""
