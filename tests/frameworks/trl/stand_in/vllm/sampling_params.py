"""See the package."""


class StructuredOutputsParams: ...
