package local

import (
	"math/bits"
	"time"

	"keyward/limits"
)

// A quotaTable holds what the quotas of a shard's cells have counted, under the shard's lock.
//
// A cell's runs are in a block of 4, 8, … or 1,024, from the shard's pool of that size; a full block's runs
// move into the next larger one. So a cell takes about 16 KB at most, and 64 bytes where it has counted
// little. Blocks lie in pages that never move, so that no growth copies the table.
type quotaTable struct {
	index map[limits.Cell]int32 // position in slots
	slots []quotaSlot
	sweep int // position in slots where the sweep goes on
	pools [blockSizes]blockPool
}

// A quotaSlot is the state of one quota's cell. It holds no pointer.
type quotaSlot struct {
	cell        limits.Cell
	size        int8 // of the block: 4 << size runs
	tally       limits.Tally
	changed     int64 // on the clock: when it counted last, or began its lockout
	block       int32 // none: it has none yet
	first, runs int32 // in the block
}

const (
	smallestBlock = 4
	blockSizes    = 9
	pageBits      = 8 // blocks of up to 256 runs share pages of 4 KB
)

// A blockPool is all blocks of a size. Blocks are numbered from 1.
type blockPool struct {
	pages [][]limits.Run
	free  int32 // first of the blocks that are not in use, linked by the time of their first run
	made  int32
}

// block returns a block's runs.
func (p *blockPool) block(size int8, number int32) []limits.Run {
	runBits := int(size) + bits.Len(smallestBlock) - 1
	perPage := max(0, pageBits-runBits)
	page, at := (number-1)>>perPage, int(number-1)&(1<<perPage-1)
	return p.pages[page][at<<runBits : (at+1)<<runBits : (at+1)<<runBits]
}

func (t *quotaTable) take(size int8) int32 {
	p := &t.pools[size]
	if number := p.free; number != none {
		p.free = int32(p.block(size, number)[0].At)
		return number
	}
	p.made++
	runs := smallestBlock << size
	if page := max(runs, 1<<pageBits); (int(p.made)-1)*runs == len(p.pages)*page {
		p.pages = append(p.pages, make([]limits.Run, page))
	}
	return p.made
}

func (t *quotaTable) giveBack(s *quotaSlot) {
	if s.block != none {
		p := &t.pools[s.size]
		p.block(s.size, s.block)[0].At = int64(p.free)
		p.free, s.block = s.block, none
	}
}

// runs returns the runs of a slot; keep puts them back.
func (t *quotaTable) runs(s *quotaSlot) limits.Runs {
	if s.block == none {
		return limits.Runs{}
	}
	return limits.Runs{Ring: t.pools[s.size].block(s.size, s.block), First: s.first, Len: s.runs}
}

func (s *quotaSlot) keep(runs *limits.Runs) { s.first, s.runs = runs.First, runs.Len }

// move copies the runs of a slot into a block that has room for so many, in place of the one it has.
func (t *quotaTable) move(s *quotaSlot, runs *limits.Runs, room int32) {
	size := int8(0)
	for smallestBlock<<size < room {
		size++
	}
	number := t.take(size)
	*runs = runs.CopyTo(t.pools[size].block(size, number))
	t.giveBack(s)
	s.block, s.size = number, size
}

// judgeQuota finds what a quota's cell has counted and says how long it refuses. It spends nothing.
func (c *involved) judgeQuota(t *quotaTable, q *limits.QuotaDemand, at instant) (wait time.Duration, trips bool) {
	position, ok := t.index[q.Cell]
	if !ok {
		c.slot = missing
		var tally limits.Tally
		var runs limits.Runs
		return tally.Judge(&runs, &q.Quota, q.Units(), at.clock, at.wall)
	}
	c.slot = position
	s := &t.slots[position]
	runs := t.runs(s)
	wait, trips = s.tally.Judge(&runs, &q.Quota, q.Units(), at.clock, at.wall)
	s.keep(&runs)
	return wait, trips
}

// spendQuota counts what judgeQuota has found room for.
func (c *involved) spendQuota(t *quotaTable, q *limits.QuotaDemand, at instant) {
	if c.slot == missing {
		c.slot = t.add(&q.Cell)
	}
	s := &t.slots[c.slot]
	runs := t.runs(s)
	if int(runs.Len) == len(runs.Ring) {
		t.move(s, &runs, runs.Len+1)
	}
	s.tally.Spend(&runs, &q.Quota, q.Units(), at.clock, at.wall)
	s.keep(&runs)
	s.changed = at.clock
}

// lockQuota begins the lockout of the quota that a refusal reports.
func (c *involved) lockQuota(t *quotaTable, q *limits.QuotaDemand, at instant) {
	s := &t.slots[c.slot] // it has one: what has counted nothing does not trip
	runs := t.runs(s)
	s.tally.Lock(&runs, &q.Quota, at.clock)
	s.keep(&runs)
	s.changed = at.clock
}

// add makes the slot of a cell that the table does not have. Its number was reserved.
func (t *quotaTable) add(cell *limits.Cell) int32 {
	if t.index == nil {
		t.index = make(map[limits.Cell]int32)
	}
	position := int32(len(t.slots))
	t.index[*cell] = position
	t.slots = append(t.slots, quotaSlot{cell: *cell})
	return position
}

// reserve sees to it that there may be so many more quota cells.
func (l *Limiter) reserve(cells int64) bool {
	if cells > 0 && l.quotaCells.Add(cells) > l.quotaBound {
		l.quotaCells.Add(-cells)
		return false
	}
	return true
}

// sweepQuotas looks at the next few cells of a shard's quotas and drops the idle ones.
func (l *Limiter) sweepQuotas(t *quotaTable, at instant) (dropped int) {
	for range min(sweepStep, len(t.slots)) {
		if t.sweep >= len(t.slots) {
			t.sweep = 0
		}
		s := &t.slots[t.sweep]
		if runs := t.runs(s); !s.tally.Idle(&runs, at.clock, at.wall) {
			t.sweep++
			continue
		}
		t.giveBack(s)
		last := len(t.slots) - 1
		delete(t.index, s.cell)
		if t.sweep != last {
			*s = t.slots[last]
			t.index[s.cell] = int32(t.sweep)
		}
		t.slots = t.slots[:last]
		dropped++
	}
	l.quotaCells.Add(-int64(dropped))
	return dropped
}
