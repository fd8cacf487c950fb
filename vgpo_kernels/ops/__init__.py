"""The public function of each operator: documentation, checks, schema, fake kernel and autograd."""
