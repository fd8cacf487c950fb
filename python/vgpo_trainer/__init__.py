"""Train vision-language models with VGPO on TRL, and the demo, the report and the ``vgpo`` command around it."""
