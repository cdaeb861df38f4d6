"""Statistics: functions of arrays, without torch, records or configuration files."""
