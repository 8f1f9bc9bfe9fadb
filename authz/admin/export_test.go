package admin

// HashAgentToken is what a Settler hashes with.
var HashAgentToken = hashAgentToken

// HashWith replaces it.
func (s *Settler) HashWith(hash func(random string, salt [16]byte) [128]byte) { s.hash = hash }
