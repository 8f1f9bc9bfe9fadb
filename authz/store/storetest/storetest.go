// Package storetest is the contract of admin.Store, as tests. Every store passes the same ones.
//
// Trade-off: it knows a store by its interface only, so it cannot kill a process or fill a disk; each
// store's own tests do that. It asks for no fake clock either, because a store's clock may be on another
// machine: where time matters it waits for tens of milliseconds.
//
// Begin with [Run].
package storetest

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// AuditKeys are what the stores of Run make the MACs of the audit's segments with.
var AuditKeys = admin.NewAuditKeys(apikey.Peppers{Current: apikey.NewPepper(1, true)})

// Run runs the whole contract. open makes a new, empty store with AuditKeys each time; Run closes it.
func Run(t *testing.T, open func(t *testing.T) admin.Store) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, s admin.Store)
	}{
		{"Instances", testInstances},
		{"KeyComesBackWhole", testKeyComesBackWhole},
		{"NilIsNotEmpty", testNilIsNotEmpty},
		{"TimesToTheMicrosecond", testTimesToTheMicrosecond},
		{"UpdateKeyChangesOnlyWhatMay", testUpdateKey},
		{"Generations", testGenerations},
		{"PagesWithoutGapsOrDoubles", testPages},
		{"EndGeneration", testEndGeneration},
		{"DeleteKey", testDeleteKey},
		{"ListsAreWhatTheFilterSays", testLists},
		{"ListsInPages", testListPages},
		{"ListsInShortPages", testKeyPages},
		{"Counts", testCounts},
		{"CountsUnderChange", testCountsUnderChange},
		{"Creations", testCreations},
		{"DueKeysAndMarks", testDueKeys},
		{"RevokedKeys", testRevokedKeys},
		{"OneLeads", testLead},
		{"Refusals", testRefusals},
		{"RefusedWriteDidNothing", testRefusedWriteDidNothing},
		{"BystandersStay", testBystandersStay},
		{"DeleteInstance", testDeleteInstance},
		{"Tokens", testTokens},
		{"Audit", testAudit},
		{"AuditIsAChain", testAuditChain},
		{"FindEvents", testFindEvents},
		{"Replays", testReplays},
		{"Quotas", testQuotas},
		{"QuotaStates", testQuotaStates},
		{"Usage", testUsage},
		{"UsageAgrees", testUsageAgrees},
		{"UsageNetworks", testUsageNetworks},
		{"UsageTop", testUsageTop},
		{"UsageAllOrNothing", testUsageAllOrNothing},
		{"UsageBatches", testUsageBatches},
		{"UsageOfAnotherInstance", testUsageOfAnotherInstance},
		{"UsageForgotten", testForgetUsage},
		{"UsageGoesWithItsInstance", testUsageGoesWithItsInstance},
		{"NoAuditNoMutation", testNoAuditNoMutation},
		{"ErrorTakesEverythingBack", testErrorTakesBack},
		{"PanicTakesEverythingBack", testPanicTakesBack},
		{"TransactionSeesItsWrites", testSeesOwnWrites},
		{"NobodySeesUncommittedWrites", testUncommitted},
		{"UpdatesSerialise", testUpdatesSerialise},
		{"RecordsAreAsNewAsTheirRevision", testFreshness},
		{"Changes", testChanges},
		{"ChangesTruncated", testTruncated},
		{"Digests", testDigests},
		{"RecentKeys", testRecentKeys},
		{"RecentKeysKeepNoWriterWaiting", testRecentKeysAndWriter},
		{"LastUseOnlyGrows", testTouch},
		{"Sessions", testSessions},
		{"KeysUsage", testKeysUsage},
		{"Peppers", testPeppers},
		{"Redigest", testRedigest},
		{"RetirePepper", testRetirePepper},
		{"LeftCountsUsableSecrets", testLeft},
		{"PendingUntilSettled", testPending},
		{"Alerts", testAlerts},
		{"Notices", testNotices},
		{"NoticesForgotten", testForgetNotices},
		{"Networks", testNetworks},
		{"MarkOnce", testMark},
		{"Replicas", testReplicas},
		{"ReplicasRunOut", testReplicasRunOut},
		{"DoneContext", testDoneContext},
		{"DoneContextTakesEverythingBack", testDoneContextTakesBack},
		{"CloseWaits", testClose},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := open(t)
			t.Cleanup(func() {
				if err := s.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
			test.run(t, s)
		})
	}
}

// noon is when things happen in these tests.
var noon = time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC)

// id makes ids that sort by n.
func id(n int) (id apikey.ID) {
	binary.BigEndian.PutUint64(id[8:], uint64(n))
	id[0] = 1
	return id
}

// digest makes a digest of a name.
func digest(format string, args ...any) apikey.Digest {
	return sha256.Sum256(fmt.Appendf(nil, format, args...))
}

// event is an audit event where the test is not about audit.
var event = admin.Event{At: noon, Actor: "storetest", Action: "test"}

// update changes the store and writes the audit event.
func update(t *testing.T, s admin.Store, fn func(tx admin.Tx) error) apikey.Revision {
	t.Helper()
	revision, err := s.Update(t.Context(), func(tx admin.Tx) error {
		return errors.Join(tx.Audit(t.Context(), event), fn(tx))
	})
	if err != nil {
		t.Fatalf("update: %v", err)
	}
	return revision
}

// instance makes empty instances.
func instance(t *testing.T, s admin.Store, ids ...string) {
	t.Helper()
	update(t, s, func(tx admin.Tx) error {
		for _, id := range ids {
			if err := tx.PutInstance(t.Context(), &apikey.Instance{ID: id, CreatedAt: noon}); err != nil {
				return err
			}
		}
		return nil
	})
}

// plain is a key with nothing but a name.
func plain(instanceID string, n int) *apikey.Key {
	return &apikey.Key{
		ID: id(n), InstanceID: instanceID, Type: apikey.TypeInstance, Name: fmt.Sprint("key ", n), CreatedAt: noon, CreatedBy: "storetest",
	}
}

// insert adds a key and one generation under pepper version 1.
func insert(ctx context.Context, tx admin.Tx, k *apikey.Key, d apikey.Digest) error {
	if err := tx.InsertKey(ctx, k); err != nil {
		return err
	}
	return tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 1, Hint: "kwi_…abcd", CreatedAt: noon}, d, 1)
}

// keyOf adds a plain key found by digest("key n") to an instance.
func keyOf(t *testing.T, s admin.Store, instanceID string, n int) *apikey.Key {
	t.Helper()
	k := plain(instanceID, n)
	update(t, s, func(tx admin.Tx) error { return insert(t.Context(), tx, k, digest("key %d", n)) })
	return k
}

// fullKey is a key in which every field has a value.
func fullKey(instanceID string, n int) *apikey.Key {
	return &apikey.Key{
		ID:                id(n),
		InstanceID:        instanceID,
		Type:              apikey.TypeAgent,
		Name:              "näme '; --",
		Description:       "a\nb",
		AgentName:         "agent",
		UserPrincipalName: "user@example.com",
		Environment:       "prod",
		Scopes:            apikey.Scopes{"a:*", "b"},
		AllowedIPs:        []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")},
		Limits: apikey.Limits{
			Rate:          apikey.Rate{Requests: 7, Per: apikey.Duration(90 * time.Second)},
			Burst:         3,
			MaxConcurrent: apikey.Unlimited,
		},
		Quotas:         map[string]apikey.QuotaOverride{"monthly": {Limit: 500}, "daily": {Limit: apikey.Unlimited}},
		ExpirationDate: noon.Add(24 * time.Hour),
		InactivityDays: 90,
		NotBefore:      noon.Add(-time.Hour),
		Metadata:       map[string]string{"team": "blue", "": "empty name", "quote": `"`},
		Disabled:       true,
		RevokedAt:      noon.Add(time.Minute),
		RevokedReason:  apikey.RevokedOther,
		LeakReportedAt: noon.Add(2 * time.Minute),
		IdleFrom:       noon.Add(3 * time.Minute),
		CreatedAt:      noon,
		CreatedBy:      "token:x",
		LastUsedAt:     noon.Add(time.Second), LastUsedNetwork: "192.0.2.0/24", LastUsedPath: "api.example/v1/",
	}
}

// fullGeneration is a generation in which every field has a value.
var fullGeneration = apikey.Generation{
	Number: 1, Hint: "kwa_…wxyz", CreatedAt: noon, ValidUntil: noon.Add(time.Hour), LastUsedAt: noon.Add(time.Second),
	Revoked: true,
}

// wantNoZero fails if a field of a fixture has no value, but for the named ones: so a field that is
// added to a record later cannot be forgotten by a store.
func wantNoZero(t *testing.T, record any, but ...string) {
	t.Helper()
	v := reflect.ValueOf(record)
	allowed := map[string]bool{}
	for _, name := range but {
		allowed[name] = true
	}
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; v.Field(i).IsZero() && !allowed[name] {
			t.Fatalf("the fixture leaves %T.%s empty: nothing would prove that a store keeps it", record, name)
		}
	}
}

// found returns what a digest finds.
func found(t *testing.T, s admin.Reader, d apikey.Digest) *apikey.Key {
	t.Helper()
	k, _, err := s.FindKey(t.Context(), d)
	if err != nil {
		t.Fatalf("find key: %v", err)
	}
	return k
}

// wantNotFound fails unless a digest finds nothing.
func wantNotFound(t *testing.T, s admin.Reader, d apikey.Digest) {
	t.Helper()
	if k, _, err := s.FindKey(t.Context(), d); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("find key: got %v and error %v, want ErrNotFound", k, err)
	}
}

// wantSame fails if got is not want; nil and empty differ, and so do time zones. JSON may be laid out anew.
func wantSame(t *testing.T, what string, want, got any, opts ...cmp.Option) {
	t.Helper()
	if reflect.DeepEqual(want, got) { // cmp takes its time over hundreds of keys
		return
	}
	opts = append(opts,
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b time.Time) bool { return a.Equal(b) && a.Location() == b.Location() }),
		cmp.Transformer("JSON", func(m json.RawMessage) (v any) {
			if m != nil {
				if err := json.Unmarshal(m, &v); err != nil {
					return err.Error()
				}
			}
			return v
		}))
	if d := cmp.Diff(want, got, opts...); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}
