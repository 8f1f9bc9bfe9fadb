// Package loopback gives out addresses for servers that are restarted where they were: in tests and benchmarks,
// of which several processes run side by side.
package loopback

import (
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
)

const (
	// Below the range that the system takes the ports of outgoing connections and of listeners of port 0 from.
	first, last = 10_100, 32_000
	block       = 100
)

// taken are the ports that this process may still give out. Its guards are listeners that it keeps: whoever
// listens on the first port of a block has all of the block, so that no process gets, or even tries, a port
// of another's server while that is down.
var taken struct {
	sync.Mutex
	ports  []int
	guards []net.Listener
}

// FreeAddress returns an address of 127.0.0.1 that nobody listens on, and that no other call returns, in this
// process or in another that calls it, as long as this one runs. It panics when no port is left.
func FreeAddress() string {
	taken.Lock()
	defer taken.Unlock()
	if len(taken.ports) == 0 {
		takeBlock()
	}
	port := taken.ports[0]
	taken.ports = taken.ports[1:]
	return address(port)
}

func address(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// takeBlock takes a block, without the ports that others listen on.
func takeBlock() {
	blocks := (last - first) / block
	for _, n := range rand.Perm(blocks) {
		guard, err := net.Listen("tcp", address(first+n*block))
		if err != nil {
			continue
		}
		taken.guards = append(taken.guards, guard)
		for port := range block - 1 {
			taken.ports = append(taken.ports, first+n*block+1+port)
		}
		// Tried here and not when they are given out: a child of this process between fork and exec would
		// keep the listener of the trial.
		taken.ports = slices.DeleteFunc(taken.ports, func(port int) bool {
			l, err := net.Listen("tcp", address(port))
			if err != nil {
				return true
			}
			_ = l.Close()
			return false
		})
		if len(taken.ports) > 0 {
			return
		}
	}
	panic(fmt.Sprintf("loopback: none of the %d blocks of ports from %d is free", blocks, first))
}
