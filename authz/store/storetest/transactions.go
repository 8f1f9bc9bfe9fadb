package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/limits"
)

// A state is all that a store keeps and a Reader tells, but for what every Update changes: revision,
// changes and audit.
type state struct {
	Instances []*apikey.Instance
	Keys      map[string][]*apikey.Key
	Digests   map[apikey.Digest]string // what they find
	Tokens    []*admin.Token
	Peppers   []admin.PepperRecord
	Counts    map[string]admin.KeyCounts // of each instance
}

func dump(t *testing.T, s admin.Reader) state {
	t.Helper()
	ctx := t.Context()
	all := state{Keys: map[string][]*apikey.Key{}, Digests: map[apikey.Digest]string{}, Counts: map[string]admin.KeyCounts{}}
	var errs [6]error
	all.Instances, errs[0] = s.Instances(ctx)
	for _, in := range all.Instances {
		in.Revision = 0
		all.Keys[in.ID], errs[1] = s.Keys(ctx, in.ID, admin.KeyQuery{Limit: 1_000_000})
		all.Counts[in.ID], errs[5] = s.CountKeys(ctx, in.ID, admin.KeyOwner{}, noon)
	}
	_, errs[2] = s.Digests(ctx, func(d apikey.Digest) bool {
		all.Digests[d] = ""
		return true
	})
	all.Tokens, errs[3] = s.Tokens(ctx)
	all.Peppers, errs[4] = s.Peppers(ctx)
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	for d := range all.Digests {
		k := found(t, s, d)
		all.Digests[d] = fmt.Sprint(k.ID, k.Generation)
	}
	return all
}

func head(t *testing.T, s admin.Reader) apikey.Revision {
	t.Helper()
	_, head, _, err := s.Changes(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	return head
}

func events(t *testing.T, s admin.Reader) []admin.Event {
	t.Helper()
	list, err := s.Events(t.Context(), 0, 1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// wantUntouched fails unless run leaves everything as it was: records, revision, changes and audit.
func wantUntouched(t *testing.T, s admin.Store, run func()) {
	t.Helper()
	records, revision, audit, chain := dump(t, s), head(t, s), events(t, s), segments(t, s)
	run()
	wantSame(t, "records", records, dump(t, s))
	wantSame(t, "revision", revision, head(t, s))
	wantSame(t, "audit", audit, events(t, s))
	wantSame(t, "audit segments", chain, segments(t, s))
}

// populate makes a store with a bit of everything: key 1 of "tenant", a token, a pepper.
func populate(t *testing.T, s admin.Store) {
	t.Helper()
	ctx := t.Context()
	instance(t, s, "tenant")
	keyOf(t, s, "tenant", 1)
	update(t, s, func(tx admin.Tx) error {
		return errors.Join(
			tx.InsertToken(ctx, &admin.Token{ID: id(50), CreatedAt: noon}, digest("token"), 1),
			tx.PutPepper(ctx, 1, [16]byte{1}))
	})
}

// writeEverything uses every write of a Tx.
func writeEverything(ctx context.Context, tx admin.Tx) error {
	changed := plain("tenant", 1)
	changed.RevokedAt = noon
	_, err := tx.Mark(ctx, "mark")
	return errors.Join(err,
		tx.Audit(ctx, event),
		tx.PutInstance(ctx, &apikey.Instance{ID: "new", CreatedAt: noon}),
		tx.PutInstance(ctx, &apikey.Instance{ID: "tenant", Policy: apikey.Policy{Disabled: true}}),
		tx.UpdateKey(ctx, changed),
		tx.InsertGeneration(ctx, id(1), apikey.Generation{Number: 2}, digest("key 1 again"), 2),
		insert(ctx, tx, plain("new", 2), digest("key 2")),
		tx.EndGeneration(ctx, id(1), 1, noon, true),
		tx.MarkEnded(ctx, id(1), noon),
		tx.DeleteKey(ctx, "new", id(2)),
		insert(ctx, tx, plain("new", 3), digest("key 3")),
		tx.DeleteInstance(ctx, "new"),
		tx.InsertToken(ctx, &admin.Token{ID: id(51)}, digest("token 2"), 2),
		tx.RevokeToken(ctx, id(50), noon),
		tx.PutPepper(ctx, 2, [16]byte{2}),
		tx.RetirePepper(ctx, 1),
		tx.KeepReplay(ctx, admin.ReplayID{1}, []byte("sealed"), noon, noon.Add(time.Hour)))
}

func testNoAuditNoMutation(t *testing.T, s admin.Store) {
	populate(t, s)
	wantUntouched(t, s, func() {
		revision, err := s.Update(t.Context(), func(tx admin.Tx) error {
			return tx.PutInstance(t.Context(), &apikey.Instance{ID: "unaudited"})
		})
		if err == nil || errors.Is(err, apikey.ErrUndecided) || revision != 0 {
			t.Errorf("got revision %d and error %v, want a refusal that is no outage", revision, err)
		}
	})
	// Only an audit event, such as that of a refused attempt, is fine.
	before := head(t, s)
	if revision := update(t, s, func(admin.Tx) error { return nil }); revision <= before {
		t.Errorf("got revision %d, want more than %d", revision, before)
	}
}

func testErrorTakesBack(t *testing.T, s admin.Store) {
	populate(t, s)
	mine := errors.New("mine")
	wantUntouched(t, s, func() {
		_, err := s.Update(t.Context(), func(tx admin.Tx) error {
			if err := writeEverything(t.Context(), tx); err != nil {
				t.Errorf("write: %v", err)
			}
			return mine
		})
		if err != mine { //nolint:errorlint // as it is, not wrapped
			t.Errorf("got error %v, want fn's own", err)
		}
	})
	// The mark was taken back too.
	update(t, s, func(tx admin.Tx) error {
		if first, err := tx.Mark(t.Context(), "mark"); err != nil || !first {
			t.Errorf("mark: got first %t and error %v, want true", first, err)
		}
		return nil
	})
	update(t, s, func(tx admin.Tx) error { // and what was taken back can be done
		_ = tx.Audit(t.Context(), event)
		return tx.PutInstance(t.Context(), &apikey.Instance{ID: "new"})
	})
}

func testPanicTakesBack(t *testing.T, s admin.Store) {
	populate(t, s)
	wantUntouched(t, s, func() {
		defer func() {
			if r := recover(); r != "mine" {
				t.Errorf("recovered %v, want fn's own panic", r)
			}
		}()
		_, _ = s.Update(t.Context(), func(tx admin.Tx) error {
			if err := writeEverything(t.Context(), tx); err != nil {
				t.Errorf("write: %v", err)
			}
			panic("mine")
		})
	})
	keyOf(t, s, "tenant", 9) // the store still works
}

func testSeesOwnWrites(t *testing.T, s admin.Store) {
	ctx := t.Context()
	populate(t, s)
	old := head(t, s)
	var inside state
	var insideEvents []admin.Event
	var insideChanges []apikey.Change
	revision := update(t, s, func(tx admin.Tx) error {
		if err := writeEverything(ctx, tx); err != nil {
			return err
		}
		inside, insideEvents = dump(t, tx), events(t, tx)
		var head apikey.Revision
		var truncated bool
		var err error
		insideChanges, head, truncated, err = tx.Changes(ctx, old)
		if !truncated || head <= old { // writeEverything retires a pepper
			t.Errorf("changes inside: got head %d and truncated %t, want more than %d, true", head, truncated, old)
		}
		if _, at, err := tx.FindKey(ctx, digest("key 1 again")); err != nil || at != head {
			t.Errorf("found inside at revision %d, error %v, want %d", at, err, head)
		}
		return err
	})
	wantSame(t, "records seen inside and after", dump(t, s), inside)
	wantSame(t, "audit seen inside and after", events(t, s), insideEvents)
	if len(insideChanges) != 0 {
		t.Errorf("truncated changes came with a list: %v", insideChanges)
	}
	update(t, s, func(tx admin.Tx) error {
		if err := tx.PutInstance(ctx, &apikey.Instance{ID: "another"}); err != nil {
			return err
		}
		changes, head, truncated, err := tx.Changes(ctx, revision)
		if err != nil || truncated || len(changes) != 1 || changes[0].InstanceID != "another" || changes[0].Revision != head {
			t.Errorf("changes inside: got %v, head %d, truncated %t, error %v", changes, head, truncated, err)
		}
		return err
	})
}

func testUncommitted(t *testing.T, s admin.Store) {
	populate(t, s)
	records, revision := dump(t, s), head(t, s)
	update(t, s, func(tx admin.Tx) error {
		if err := writeEverything(t.Context(), tx); err != nil {
			return err
		}
		wantSame(t, "records read outside during the transaction", records, dump(t, s))
		wantSame(t, "revision read outside during the transaction", revision, head(t, s))
		return nil
	})
	if now := head(t, s); now <= revision {
		t.Errorf("head after: got %d, want more than %d", now, revision)
	}
}

func testUpdatesSerialise(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	const n = 100
	revisions := make([]apikey.Revision, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			revision, err := s.Update(ctx, func(tx admin.Tx) error {
				in, err := tx.Instance(ctx, "tenant")
				if err != nil {
					return err
				}
				in.Policy.Defaults.User.Burst++ // read, then written: lost if two transactions overlap
				return errors.Join(tx.Audit(ctx, event), tx.PutInstance(ctx, in))
			})
			if err != nil {
				t.Errorf("update: %v", err)
			}
			revisions[i] = revision
		})
	}
	all.Wait()
	in, err := s.Instance(ctx, "tenant")
	if err != nil {
		t.Fatal(err)
	}
	if got := in.Policy.Defaults.User.Burst; got != n {
		t.Errorf("counted %d updates, want %d", got, n)
	}
	slices.Sort(revisions)
	if got := len(slices.Compact(revisions)); got != n {
		t.Errorf("got %d different revisions, want %d", got, n)
	}
}

// testFreshness: a record is never older than the revision beside it, and a read that starts after an
// Update returned sees it. Caches rest on both.
func testFreshness(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	first := keyOf(t, s, "tenant", 1)
	const rounds = 60
	var acknowledged, wanted sync.Map // revision -> name; and the reverse
	var newest atomic.Uint64
	note := func(revision apikey.Revision, name string) {
		acknowledged.Store(name, revision)
		wanted.Store(revision, name)
		newest.Store(uint64(revision))
	}
	note(head(t, s), first.Name)
	done := make(chan struct{})
	var all sync.WaitGroup
	answers := make([]map[string]apikey.Revision, 4) // the newest revision that came with a name
	for i := range answers {
		answers[i] = map[string]apikey.Revision{}
		all.Go(func() {
			for more := true; more; {
				select {
				case <-done:
					more = false // one last look
				default:
				}
				floor := apikey.Revision(newest.Load())
				k, revision, err := s.FindKey(ctx, digest("key 1"))
				if err != nil {
					t.Errorf("find key: %v", err)
					return
				}
				if revision < floor {
					t.Errorf("revision %d, though %d was acknowledged before the read", revision, floor)
				}
				if _, miss, err := s.FindKey(ctx, digest("nothing")); !errors.Is(err, apikey.ErrNotFound) || miss < revision {
					t.Errorf("miss after revision %d: got revision %d, error %v", revision, miss, err)
				}
				answers[i][k.Name] = max(revision, answers[i][k.Name])
			}
		})
	}
	for i := range rounds {
		k := plain("tenant", 1)
		k.Name = fmt.Sprint("round ", i)
		note(update(t, s, func(tx admin.Tx) error { return tx.UpdateKey(ctx, k) }), k.Name)
	}
	close(done)
	all.Wait()
	for _, answer := range answers {
		for name, revision := range answer {
			written, ok := acknowledged.Load(name)
			if !ok {
				t.Errorf("read %q, which nobody wrote", name)
				continue
			}
			// A name that came with a revision must have been the newest at that revision.
			for newer := written.(apikey.Revision) + 1; newer <= revision; newer++ {
				if _, changed := wanted.Load(newer); changed {
					t.Errorf("%q came with revision %d, but revision %d had replaced it", name, revision, newer)
					break
				}
			}
		}
	}
}

func testBystandersStay(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "neighbour")
	update(t, s, func(tx admin.Tx) error {
		for n := range 200 {
			in := "tenant"
			if n%2 == 1 {
				in = "neighbour"
			}
			k := fullKey(in, n+1000)
			if err := insert(ctx, tx, k, digest("bystander %d", n)); err != nil {
				return err
			}
			if err := tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 2, Hint: "h"}, digest("bystander %d again", n), 2); err != nil {
				return err
			}
			if err := tx.InsertToken(ctx, &admin.Token{ID: id(n + 1000), CreatedAt: noon, InstanceID: in}, digest("bystander %d", n), 1); err != nil {
				return err
			}
		}
		return errors.Join(
			tx.PutPepper(ctx, 1, [16]byte{1}), tx.PutPepper(ctx, 2, [16]byte{2}),
			insert(ctx, tx, plain("tenant", 1), digest("key 1")),
			tx.InsertToken(ctx, &admin.Token{ID: id(1)}, digest("token 1"), 1))
	})
	// bystanders is everything but key 1, token 1 and what is called "target".
	bystanders := func(all state) state {
		all.Peppers, all.Counts = nil, nil // they count the targets too
		all.Keys, all.Digests = maps.Clone(all.Keys), maps.Clone(all.Digests)
		all.Keys["tenant"] = slices.DeleteFunc(slices.Clone(all.Keys["tenant"]), func(k *apikey.Key) bool { return k.ID == id(1) })
		all.Tokens = slices.DeleteFunc(slices.Clone(all.Tokens), func(t *admin.Token) bool { return t.ID == id(1) })
		all.Instances = slices.DeleteFunc(slices.Clone(all.Instances), func(in *apikey.Instance) bool { return in.ID == "target" })
		delete(all.Keys, "target")
		for _, name := range []string{"key 1", "key 1 new", "key 1 again", "target"} {
			delete(all.Digests, digest("%s", name))
		}
		return all
	}
	revoked := plain("tenant", 1)
	revoked.RevokedAt = noon
	inUpdate := func(fn func(tx admin.Tx) error) func() error {
		return func() error { update(t, s, fn); return nil }
	}
	before := dump(t, s)
	for _, c := range []struct {
		name string
		run  func() error
	}{
		{"touch", func() error {
			return s.Touch(ctx, []apikey.Use{{KeyID: id(1), Generation: 1, At: noon.Add(time.Hour)}})
		}},
		{"redigest", func() error {
			return s.Redigest(ctx, []admin.Redigest{{Old: digest("key 1"), New: digest("key 1 new"), Version: 2}})
		}},
		{"put instance", inUpdate(func(tx admin.Tx) error { return tx.PutInstance(ctx, &apikey.Instance{ID: "target"}) })},
		{"insert key", inUpdate(func(tx admin.Tx) error { return insert(ctx, tx, plain("target", 2), digest("target")) })},
		{"insert generation", inUpdate(func(tx admin.Tx) error {
			return tx.InsertGeneration(ctx, id(1), apikey.Generation{Number: 2}, digest("key 1 again"), 2)
		})},
		{"update key", inUpdate(func(tx admin.Tx) error { return tx.UpdateKey(ctx, revoked) })},
		{"end generation", inUpdate(func(tx admin.Tx) error { return tx.EndGeneration(ctx, id(1), 1, noon, true) })},
		{"delete key", inUpdate(func(tx admin.Tx) error { return tx.DeleteKey(ctx, "target", id(2)) })},
		{"revoke token", inUpdate(func(tx admin.Tx) error { return tx.RevokeToken(ctx, id(1), noon) })},
		{"mark", inUpdate(func(tx admin.Tx) error { _, err := tx.Mark(ctx, "m"); return err })},
		{"delete instance", inUpdate(func(tx admin.Tx) error { return tx.DeleteInstance(ctx, "target") })},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := c.run(); err != nil {
				t.Fatal(err)
			}
			after := dump(t, s)
			wantSame(t, "bystanders", bystanders(before), bystanders(after))
			if c.name != "mark" && reflect.DeepEqual(before, after) {
				t.Error("nothing changed at all: the case proves nothing")
			}
			before = after
		})
	}
}

func testMark(t *testing.T, s admin.Store) {
	ctx := t.Context()
	var firsts atomic.Int64
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			var first bool
			_, err := s.Update(ctx, func(tx admin.Tx) (err error) {
				first, err = tx.Mark(ctx, "bootstrap")
				return errors.Join(err, tx.Audit(ctx, event))
			})
			if err != nil {
				t.Errorf("update: %v", err)
			} else if first {
				firsts.Add(1)
			}
		})
	}
	all.Wait()
	if n := firsts.Load(); n != 1 {
		t.Errorf("%d calls were first, want 1", n)
	}
	update(t, s, func(tx admin.Tx) error {
		for _, want := range []bool{true, false} {
			if first, err := tx.Mark(ctx, "another"); err != nil || first != want {
				t.Errorf("another mark: got first %t and error %v, want %t", first, err, want)
			}
		}
		return nil
	})
}

// everyCall is every call of a Store that talks to what keeps the records.
func everyCall(s admin.Store) map[string]func(ctx context.Context) error {
	return map[string]func(ctx context.Context) error{
		"Instance":  func(ctx context.Context) error { _, err := s.Instance(ctx, "tenant"); return err },
		"Instances": func(ctx context.Context) error { _, err := s.Instances(ctx); return err },
		"Key":       func(ctx context.Context) error { _, err := s.Key(ctx, "tenant", id(1)); return err },
		"Keys":      func(ctx context.Context) error { _, err := s.Keys(ctx, "tenant", admin.KeyQuery{Limit: 1}); return err },
		"KeyPage": func(ctx context.Context) error {
			_, err := s.KeyPage(ctx, "tenant", admin.KeyQuery{Limit: 1})
			return err
		},
		"FindKey": func(ctx context.Context) error { _, _, err := s.FindKey(ctx, digest("key 1")); return err },
		"miss":    func(ctx context.Context) error { _, _, err := s.FindKey(ctx, digest("nothing")); return err },
		"CountKeys": func(ctx context.Context) error {
			_, err := s.CountKeys(ctx, "tenant", admin.KeyOwner{}, noon)
			return err
		},
		"Creations":   func(ctx context.Context) error { _, err := s.Creations(ctx, "tenant", "", noon, 1); return err },
		"DueKeys":     func(ctx context.Context) error { _, err := s.DueKeys(ctx, noon, noon, 1); return err },
		"RevokedKeys": func(ctx context.Context) error { _, err := s.RevokedKeys(ctx, "tenant", noon, 1); return err },
		"Lead":        func(ctx context.Context) error { _, err := s.Lead(ctx, "job", "r", time.Minute); return err },
		"LastUsed":    func(ctx context.Context) error { _, err := s.LastUsed(ctx, id(1)); return err },
		"AgentHash":   func(ctx context.Context) error { _, err := s.AgentHash(ctx, id(1)); return err },
		"Digests": func(ctx context.Context) error {
			_, err := s.Digests(ctx, func(apikey.Digest) bool { return true })
			return err
		},
		"RecentKeys": func(ctx context.Context) error {
			return s.RecentKeys(ctx, func(*apikey.Key, apikey.Revision) bool { return true })
		},
		"Changes":    func(ctx context.Context) error { _, _, _, err := s.Changes(ctx, 0); return err },
		"Token":      func(ctx context.Context) error { _, err := s.Token(ctx, digest("token")); return err },
		"Tokens":     func(ctx context.Context) error { _, err := s.Tokens(ctx); return err },
		"PepperLeft": func(ctx context.Context) error { _, err := s.PepperLeft(ctx, 1); return err },
		"Peppers":    func(ctx context.Context) error { _, err := s.Peppers(ctx); return err },
		"Events":     func(ctx context.Context) error { _, err := s.Events(ctx, 0, 1); return err },
		"FindEvents": func(ctx context.Context) error {
			_, err := s.FindEvents(ctx, admin.EventFilter{}, admin.EventPlace{}, 1)
			return err
		},
		"Mutations":     func(ctx context.Context) error { _, err := s.Mutations(ctx); return err },
		"AuditSegments": func(ctx context.Context) error { _, err := s.AuditSegments(ctx); return err },
		"Replay":        func(ctx context.Context) error { _, err := s.Replay(ctx, admin.ReplayID{}, noon); return err },
		"TouchTokens":   func(ctx context.Context) error { return s.TouchTokens(ctx, []admin.TokenUse{{ID: id(1), At: noon}}) },
		"SealAudit":     func(ctx context.Context) error { return s.SealAudit(ctx) },
		"ForgetReplays": func(ctx context.Context) error { return s.ForgetReplays(ctx, noon) },
		"SaveQuotaStates": func(ctx context.Context) error {
			return s.SaveQuotaStates(ctx, []limits.QuotaState{{Until: noon, Counts: []byte{1}}})
		},
		"QuotaStates": func(ctx context.Context) error {
			return s.QuotaStates(ctx, noon, func(limits.QuotaState) bool { return true })
		},
		"ForgetQuotaStates": func(ctx context.Context) error { return s.ForgetQuotaStates(ctx, noon) },
		"AddUsage": func(ctx context.Context) error {
			return s.AddUsage(ctx, admin.UsageBatch{}, []admin.Usage{{Start: noon}})
		},
		"Usage":    func(ctx context.Context) error { _, err := s.Usage(ctx, admin.UsageQuery{}); return err },
		"TopUsage": func(ctx context.Context) error { _, err := s.TopUsage(ctx, "", admin.UsageTop{}); return err },
		"ForgetUsage": func(ctx context.Context) error {
			return s.ForgetUsage(ctx, map[admin.UsageInterval]time.Time{admin.UsageDay: noon})
		},
		"ForgetDeleted":  func(ctx context.Context) error { return s.ForgetDeleted(ctx) },
		"ForgetNotices":  func(ctx context.Context) error { _, _, err := s.ForgetNotices(ctx, noon, 1); return err },
		"PutAlert":       func(ctx context.Context) error { return s.PutAlert(ctx, &admin.Alert{ID: id(1)}) },
		"Alert":          func(ctx context.Context) error { _, err := s.Alert(ctx, id(1)); return err },
		"OpenAlerts":     func(ctx context.Context) error { _, err := s.OpenAlerts(ctx); return err },
		"DueNotices":     func(ctx context.Context) error { _, err := s.DueNotices(ctx, noon, 1); return err },
		"RetryNotice":    func(ctx context.Context) error { return s.RetryNotice(ctx, admin.Notice{}) },
		"ForgetNotice":   func(ctx context.Context) error { return s.ForgetNotice(ctx, id(1)) },
		"KeyNetworks":    func(ctx context.Context) error { _, err := s.KeyNetworks(ctx, id(1)); return err },
		"LearnNetworks":  func(ctx context.Context) error { return s.LearnNetworks(ctx, []admin.KeyNetwork{{KeyID: id(1)}}) },
		"ForgetNetworks": func(ctx context.Context) error { return s.ForgetNetworks(ctx, noon) },
		"Alerts":         func(ctx context.Context) error { _, err := s.Alerts(ctx, admin.AlertQuery{Limit: 1}); return err },
		"ForgetAlerts":   func(ctx context.Context) error { return s.ForgetAlerts(ctx, noon) },
		"PutSession":     func(ctx context.Context) error { return s.PutSession(ctx, &admin.Session{}) },
		"Session":        func(ctx context.Context) error { _, err := s.Session(ctx, admin.SessionID{}); return err },
		"EndSession":     func(ctx context.Context) error { return s.EndSession(ctx, admin.SessionID{}) },
		"ForgetSessions": func(ctx context.Context) error { return s.ForgetSessions(ctx, noon) },

		"Touch":      func(ctx context.Context) error { return s.Touch(ctx, []apikey.Use{{KeyID: id(1), At: noon}}) },
		"Redigest":   func(ctx context.Context) error { return s.Redigest(ctx, []admin.Redigest{{Version: 2}}) },
		"Register":   func(ctx context.Context) error { return s.Register(ctx, "r", 1, time.Minute) },
		"Confirm":    func(ctx context.Context) error { return s.Confirm(ctx, "known", 1, time.Minute) },
		"Unregister": func(ctx context.Context) error { return s.Unregister(ctx, "known") },
		"Replicas":   func(ctx context.Context) error { _, err := s.Replicas(ctx); return err },
		"Update": func(ctx context.Context) error {
			_, err := s.Update(ctx, func(tx admin.Tx) error { return tx.Audit(ctx, event) })
			return err
		},
	}
}

func testDoneContext(t *testing.T, s admin.Store) {
	populate(t, s)
	if err := s.Register(t.Context(), "known", 1, time.Minute); err != nil {
		t.Fatal(err)
	}
	done, cancel := context.WithCancel(t.Context())
	cancel()
	wantUntouched(t, s, func() {
		for name, call := range everyCall(s) {
			if err := call(done); !errors.Is(err, apikey.ErrUndecided) || !errors.Is(err, context.Canceled) {
				t.Errorf("%s: got %v, want ErrUndecided and context.Canceled", name, err)
			}
		}
	})

	// A transaction that another holds up gives up in time; a store that can do both at once may.
	inside, proceed := make(chan struct{}), make(chan struct{})
	var other sync.WaitGroup
	other.Go(func() {
		_, err := s.Update(t.Context(), func(tx admin.Tx) error {
			close(inside)
			<-proceed
			return tx.Audit(t.Context(), event)
		})
		if err != nil {
			t.Errorf("update: %v", err)
		}
	})
	<-inside
	late, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := s.Update(late, func(tx admin.Tx) error { return tx.Audit(late, event) })
	if err != nil && (!errors.Is(err, apikey.ErrUndecided) || !errors.Is(err, context.DeadlineExceeded)) {
		t.Errorf("waiting for another transaction: got %v, want ErrUndecided and context.DeadlineExceeded", err)
	}
	close(proceed)
	other.Wait()
}

func testDoneContextTakesBack(t *testing.T, s admin.Store) {
	populate(t, s)
	for _, c := range []struct {
		name string
		end  func(ctx context.Context, tx admin.Tx) // what fn does after its context ended; it returns nil
	}{
		{"before the commit", func(context.Context, admin.Tx) {}},
		{"in a write that fn overlooks", func(ctx context.Context, tx admin.Tx) {
			if err := tx.PutInstance(ctx, &apikey.Instance{ID: "overlooked"}); err == nil {
				t.Error("a write with a done context succeeded")
			}
			// The next statement must not run outside the transaction.
			if err := tx.PutInstance(t.Context(), &apikey.Instance{ID: "overlooked"}); !errors.Is(err, apikey.ErrUndecided) {
				t.Errorf("write after an outage: got %v, want ErrUndecided", err)
			}
			if _, err := tx.Instances(t.Context()); !errors.Is(err, apikey.ErrUndecided) {
				t.Errorf("read after an outage: got %v, want ErrUndecided", err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantUntouched(t, s, func() {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				_, err := s.Update(ctx, func(tx admin.Tx) error {
					if err := writeEverything(ctx, tx); err != nil {
						t.Errorf("write: %v", err)
					}
					cancel()
					c.end(ctx, tx)
					return nil
				})
				if !errors.Is(err, apikey.ErrUndecided) || !errors.Is(err, context.Canceled) {
					t.Errorf("got %v, want ErrUndecided and context.Canceled", err)
				}
			})
		})
	}
	// Only one statement's own context ends; Update's does not.
	wantUntouched(t, s, func() {
		_, err := s.Update(t.Context(), func(tx admin.Tx) error {
			if err := writeEverything(t.Context(), tx); err != nil {
				t.Errorf("write: %v", err)
			}
			done, cancel := context.WithCancel(t.Context())
			cancel()
			_ = tx.PutInstance(done, &apikey.Instance{ID: "overlooked"})
			return nil
		})
		if !errors.Is(err, apikey.ErrUndecided) {
			t.Errorf("got %v, want ErrUndecided", err)
		}
	})
	keyOf(t, s, "tenant", 9) // the store still works
}

func testClose(t *testing.T, s admin.Store) {
	ctx := t.Context()
	populate(t, s)
	if err := s.Register(ctx, "known", 1, time.Minute); err != nil {
		t.Fatal(err)
	}
	inside, reading, proceed, read, closed :=
		make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})
	var updateErr, readErr, closeErr error
	var all sync.WaitGroup
	all.Go(func() {
		_, updateErr = s.Update(ctx, func(tx admin.Tx) error {
			close(inside)
			<-proceed
			return errors.Join(tx.Audit(ctx, event), insert(ctx, tx, plain("tenant", 2), digest("key 2")))
		})
	})
	all.Go(func() {
		_, readErr = s.Digests(ctx, func(apikey.Digest) bool {
			close(reading)
			<-read
			return false
		})
	})
	<-inside
	<-reading
	all.Go(func() {
		closeErr = s.Close()
		close(closed)
	})
	waits := func(what string) {
		t.Helper()
		select {
		case <-closed:
			t.Errorf("Close did not wait for %s", what)
		case <-time.After(20 * time.Millisecond):
		}
	}
	waits("a transaction")
	close(proceed)
	waits("a read")
	close(read)
	all.Wait()
	if updateErr != nil || readErr != nil || closeErr != nil {
		t.Errorf("update: %v, read: %v, close: %v", updateErr, readErr, closeErr)
	}
	for name, call := range everyCall(s) {
		if err := call(ctx); !errors.Is(err, apikey.ErrUndecided) {
			t.Errorf("%s after Close: got %v, want ErrUndecided", name, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}
