package wire

import "sync"

// answerRoom is the capacity of a new answer. gRPC gives back only what is larger than 1 KiB, and its
// own pool would clear 4 KiB for every answer.
const answerRoom = 2 << 10 // bytes

// keepRoom is the largest capacity that is kept for another answer.
const keepRoom = 64 << 10 // bytes

// answers is where answers are taken from, and given back to by gRPC when they have been written. One
// for the process: whoever sends an answer knows nothing of who made it.
var answers answerPool

type answerPool struct{ pool sync.Pool }

// Get returns a buffer of a length, which may hold what somebody wrote before.
func (p *answerPool) Get(length int) *[]byte {
	b, _ := p.pool.Get().(*[]byte)
	if b == nil || cap(*b) < length {
		fresh := make([]byte, length, max(length, answerRoom))
		return &fresh
	}
	*b = (*b)[:length]
	return b
}

// Put takes a buffer back.
func (p *answerPool) Put(b *[]byte) {
	if cap(*b) <= keepRoom {
		p.pool.Put(b)
	}
}
