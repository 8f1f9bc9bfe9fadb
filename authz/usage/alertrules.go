package usage

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// The rules: what is worth an alert. Clock and store stay with the engine.

// baselineWindows is how many windows before the present one say what is usual.
const baselineWindows = 12

// unknownMinutes is how many minutes are looked at for a flood: counts are written a moment late.
const unknownMinutes = 3

// floodReasons are the refusals that say that a secret is no key's. What counts as a flood counts as no surge:
// one event is one alert.
var floodReasons = []string{authz.ReasonUnknownKey.String(), authz.ReasonBadChecksum.String(), authz.ReasonMalformedCredential.String()}

func floodOf(c *admin.UsageCounts) (n int64) {
	for _, reason := range floodReasons {
		n += c.Reasons[reason]
	}
	return n
}

func refusalsOf(c *admin.UsageCounts) int64 { return c.Refused - floodOf(c) }

// A surge is what was refused within a window, and within an average one of those before.
type surge struct {
	now    int64
	usual  float64
	reason string // why most were; "" for no reason
}

// surgeOf sums minutes. The window ends with the minute that begins at last, and the baseline goes back to
// [surgeFrom].
func surgeOf(minutes []admin.Usage, last time.Time, window time.Duration) surge {
	var s surge
	var before int64
	reasons := map[string]int64{}
	for i := range minutes {
		u := &minutes[i]
		if u.Start.Before(windowFrom(last, window)) {
			before += refusalsOf(&u.UsageCounts)
			continue
		}
		s.now += refusalsOf(&u.UsageCounts)
		for reason, n := range u.Reasons {
			if !slices.Contains(floodReasons, reason) {
				reasons[reason] += n
			}
		}
	}
	s.usual = float64(before) / baselineWindows
	s.reason = most(reasons)
	return s
}

// windowFrom is when a window begins whose last minute begins at last, surgeFrom when the first one before it does
// that says what is usual.
func windowFrom(last time.Time, window time.Duration) time.Time {
	return last.Add(time.Minute - window)
}

func surgeFrom(last time.Time, window time.Duration) time.Time {
	return windowFrom(last, window).Add(-baselineWindows * window)
}

// most returns the name with the highest count, of equal ones the first.
func most(counts map[string]int64) string {
	names := slices.Sorted(maps.Keys(counts))
	if len(names) == 0 {
		return ""
	}
	return slices.MaxFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(counts[a], counts[b]), strings.Compare(b, a)) })
}

// begins reports whether a surge is worth an alert.
func (s surge) begins(atLeast, factor int) bool {
	return s.now >= int64(atLeast) && float64(s.now) >= float64(factor)*s.usual
}

// goesOn reports whether one that was is not over. What is usual is no measure then, because the surge itself has
// become part of it; and half of what it takes to begin keeps it from coming and going.
func (s surge) goesOn(atLeast int) bool { return 2*s.now >= int64(atLeast) }

// beginning and lasting say for people what a surge is. What lasts says nothing of what is usual: it has become so.
func (s surge) beginning(of string, window time.Duration) string {
	return s.text(of, window) + "; " + approximately(s.usual) + " is usual" + s.why()
}

func (s surge) lasting(of string, window time.Duration) string {
	return s.text(of, window) + ", and it goes on" + s.why()
}

func (s surge) text(of string, window time.Duration) string {
	return fmt.Sprintf("%s: %d requests were refused within %s", of, s.now, apikey.Duration(window))
}

func (s surge) why() string {
	if s.reason == "" {
		return ""
	}
	return "; most for " + s.reason
}

func approximately(n float64) string {
	if n > 0 && n < 1 {
		return "less than 1"
	}
	return fmt.Sprintf("%.0f", n)
}

// floodPeak is the worst minute.
func floodPeak(minutes []admin.Usage) (peak int64) {
	for i := range minutes {
		peak = max(peak, floodOf(&minutes[i].UsageCounts))
	}
	return peak
}

const dayLong = 24 * time.Hour

// inUse is how recently a key must have been used for its end to matter to somebody: a quarterly job has its
// turn within it.
const inUse = 92 * dayLong

// stageOf is how many days before its end a key is said to expire: the smallest of days that is not less than what
// is left; 0 where none is.
func stageOf(k *apikey.Key, now time.Time, days []int) (stage int) {
	left := k.ExpirationDate.Sub(now)
	if k.ExpirationDate.IsZero() || left < 0 || k.LastUsedAt.Before(now.Add(-inUse)) {
		return 0
	}
	for _, d := range days { // falling
		if left <= time.Duration(d)*dayLong {
			stage = d
		}
	}
	return stage
}

func expiringSubject(stage int) string {
	return apikey.Duration(time.Duration(stage) * dayLong).String()
}

// The subjects of alerts about keys that nobody seems to need.
const (
	subjectIdle      = "idle"
	subjectNeverUsed = "neverUsed"
)

// quietSince is since when nobody is known to have used k, as stores order keys by it.
func quietSince(k *apikey.Key) time.Time { return admin.OrderLastUsed.PlaceOf(k).At }

// unusedSubject says in which way nobody seems to need k; "" if that is not so.
func unusedSubject(k *apikey.Key, now time.Time, a apikey.UnusedKeyAlerts) string {
	quiet, days := quietSince(k), a.IdleDays
	subject := subjectIdle
	if k.LastUsedAt.IsZero() {
		subject, days = subjectNeverUsed, a.NeverUsedDays
	}
	if !quiet.Before(now.Add(-time.Duration(days) * dayLong)) {
		return ""
	}
	return subject
}

// learning is how long every network of a key is learnt silently that is older than that when it is first seen in
// use: it may have been used from many places before anybody looked.
const learning = dayLong

// learns reports whether a network that is not among the known ones of a key is learnt without a word.
func learns(k *apikey.Key, known []admin.KeyNetwork, at time.Time) bool {
	if len(known) == 0 {
		return true // the first one is never news
	}
	first := known[0].FirstAt
	for _, n := range known {
		if n.FirstAt.Before(first) {
			first = n.FirstAt
		}
	}
	old := first.Sub(k.CreatedAt) > learning || strings.HasPrefix(k.CreatedBy, admin.ImportedBy)
	return old && at.Before(first.Add(learning))
}

// nameOf names a key in a message.
func nameOf(k *apikey.Key) string { return fmt.Sprintf("key %q", k.Name) }
