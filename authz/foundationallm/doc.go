// Package foundationallm speaks the formats of FoundationaLLM, as they are, so that an installation can move
// here with its files and clients.
//
// Trade-off: where that platform's documentation and its code disagree, the documentation is followed; what
// it ignores is ignored, and said.
//
// Begin with [ParseQuotaStore].
package foundationallm
