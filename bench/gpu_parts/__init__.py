"""The stages of the GPU suite: functions of a `runner.Run`, each in a process of its own."""
