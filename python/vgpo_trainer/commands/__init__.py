"""The subcommands of ``vgpo``, one file each."""
