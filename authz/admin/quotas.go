package admin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A QuotaInput is a quota as people write it.
type QuotaInput struct {
	Name                   string           `json:"name,omitempty" pattern:"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$" doc:"Needed in a set of quotas. Where the address names the quota: that name, or absent."`
	Description            string           `json:"description,omitempty" maxLength:"1024"`
	Context                string           `json:"context" doc:"What is counted: {service}:{controller} or {service}:{controller}:{agent}, compared exactly. Several quotas may have one context; a request must pass all of them."`
	Partition              apikey.Partition `json:"partition" enum:"None,UserPrincipalName,UserIdentifier,ApiKey" doc:"Who has a count: everybody together, each principal, each principal by its identifier, each key."`
	Limit                  int              `json:"limit" minimum:"1" maximum:"1000000000" doc:"Units in the window or period."`
	Window                 string           `json:"window,omitempty" doc:"A duration from 1s to 366d, such as 60s, 1h or 30d. This or period is needed."`
	Period                 apikey.Period    `json:"period,omitempty" enum:"day,month" doc:"Instead of a window: of the calendar, in UTC."`
	Smoothed               bool             `json:"smoothed,omitempty" doc:"Judged over 20 s, with the share of the limit that falls to them, as FoundationaLLM does. The window must be a multiple of 20s."`
	Lockout                string           `json:"lockout,omitempty" doc:"How long everything is refused once the quota refused, from 1s to 366d. Absent: none."`
	DistributedEnforcement bool             `json:"distributedEnforcement,omitempty" doc:"Counted over all replicas together. What is so at present is in enforced.counted."`
	Shadow                 bool             `json:"shadow,omitempty" doc:"Counted and reported, but it refuses nothing."`
}

// A QuotaRecord is a quota as people read it: as it is defined, and as it is enforced.
type QuotaRecord struct {
	QuotaInput
	Enforced EnforcedQuota `json:"enforced"`
}

// An EnforcedQuota is what a quota comes to.
type EnforcedQuota struct {
	Limit   int64           `json:"limit" doc:"Units in any enforced window, or in each period: of a smoothed quota the share of 20 s, rounded down."`
	Window  apikey.Duration `json:"window,omitempty"`
	Period  apikey.Period   `json:"period,omitempty"`
	Counted string          `json:"counted" enum:"perReplica" doc:"Where the units are counted: perReplica, whatever distributedEnforcement says, because each replica keeps the state of limits for itself."`
}

// countedPerReplica: each replica keeps the state of limits for itself.
const countedPerReplica = "perReplica"

// QuotaRecordOf returns q as people read it.
func QuotaRecordOf(q *apikey.Quota) QuotaRecord {
	enforced := limits.QuotaOf(q, q.Limit)
	return QuotaRecord{
		QuotaInput: QuotaInputOf(q),
		Enforced:   EnforcedQuota{Limit: enforced.Limit, Window: apikey.Duration(enforced.Window), Period: q.Period, Counted: countedPerReplica},
	}
}

// QuotaInputOf returns q as people would write it.
func QuotaInputOf(q *apikey.Quota) QuotaInput {
	in := QuotaInput{
		Name: q.Name, Description: q.Description, Context: q.Context, Partition: q.Partition, Limit: q.Limit,
		Period: q.Period, Smoothed: q.Smoothed, DistributedEnforcement: q.Distributed, Shadow: q.Shadow,
	}
	for _, d := range []struct {
		from apikey.Duration
		to   *string
	}{{apikey.Duration(q.Window), &in.Window}, {apikey.Duration(q.Lockout), &in.Lockout}} {
		if d.from != 0 {
			*d.to = d.from.String()
		}
	}
	return in
}

// Quota checks in and returns the quota that it describes. Errors: *apikey.InvalidError, all joined.
func (in *QuotaInput) Quota() (apikey.Quota, error) {
	q, bad := in.quota()
	bad.add(q.Validate(""))
	return q, bad.err()
}

// quota reads in. bad are the fields that could not be read, whose faults Validate does not know; something
// valid stands in for them.
func (in *QuotaInput) quota() (q apikey.Quota, bad faults) {
	q = apikey.Quota{
		Name: in.Name, Description: in.Description, Context: in.Context, Partition: in.Partition, Limit: in.Limit,
		Period: in.Period, Smoothed: in.Smoothed, Distributed: in.DistributedEnforcement, Shadow: in.Shadow,
	}
	bad.add(text("description", in.Description, 0, 1024, "\n\t"))
	for _, d := range []struct {
		field, from string
		to          *apikey.Duration
	}{{"window", in.Window, (*apikey.Duration)(&q.Window)}, {"lockout", in.Lockout, (*apikey.Duration)(&q.Lockout)}} {
		if d.from == "" {
			continue
		}
		var err error
		if *d.to, err = apikey.ParseDuration(d.from); err == nil && *d.to == 0 {
			err = apikey.Invalid("", "must not be 0: leave it out")
		}
		if err != nil {
			bad.add(under(d.field, err))
			*d.to = apikey.Duration(apikey.SmoothedWindow)
		}
	}
	return q, bad
}

// secretFree refuses a secret in what is free text, or could be one by its grammar.
func (in *QuotaInput) secretFree(format apikey.Format, field string) error {
	var bad faults
	bad.add(noSecret(format, field+"name", in.Name))
	bad.add(noSecret(format, field+"description", in.Description))
	bad.add(noSecret(format, field+"context", in.Context))
	return bad.err()
}

// quotasOf checks the quotas that an instance is to have. Errors: *apikey.InvalidError, all joined.
func quotasOf(format apikey.Format, list []QuotaInput) ([]apikey.Quota, error) {
	var bad faults
	if len(list) > apikey.MaxQuotas {
		return nil, apikey.ValidateQuotas(make([]apikey.Quota, len(list)))
	}
	for i := range list {
		bad.add(list[i].secretFree(format, fmt.Sprintf("quotas[%d].", i)))
	}
	if err := bad.err(); err != nil {
		return nil, err // alone: what follows names quotas
	}
	quotas, unread := make([]apikey.Quota, len(list)), make([]faults, len(list))
	for i := range list {
		quotas[i], unread[i] = list[i].quota()
	}
	for i, faults := range unread {
		for _, err := range faults {
			bad.add(under(apikey.QuotaField(quotas, i), err))
		}
	}
	bad.add(apikey.ValidateQuotas(quotas))
	return quotas, bad.err()
}

// Quotas returns the quotas of an instance by name, and the revision that they are of.
func (s *Service) Quotas(ctx context.Context, caller Caller, instanceID string) ([]apikey.Quota, apikey.Revision, error) {
	id, err := caller.mayIn(instanceID, readQuotas)
	if err != nil {
		return nil, 0, err
	}
	in, err := s.store.Instance(ctx, id)
	if err != nil {
		return nil, 0, err
	}
	return in.Quotas, in.Revision, nil
}

// Quota returns one quota of an instance, and the revision that it is of.
func (s *Service) Quota(ctx context.Context, caller Caller, instanceID, name string) (apikey.Quota, apikey.Revision, error) {
	quotas, rev, err := s.Quotas(ctx, caller, instanceID)
	if err != nil {
		return apikey.Quota{}, 0, err
	}
	i := slices.IndexFunc(quotas, named(name))
	if i < 0 {
		return apikey.Quota{}, 0, apikey.ErrNotFound
	}
	return quotas[i], rev, nil
}

func named(name string) func(apikey.Quota) bool {
	return func(q apikey.Quota) bool { return q.Name == name }
}

// A QuotaChange is what becomes of one quota.
type QuotaChange struct {
	Before, After *apikey.Quota // nil: there was none, or is none any more
}

// Name is that of the quota.
func (c *QuotaChange) Name() string {
	if c.After != nil {
		return c.After.Name
	}
	return c.Before.Name
}

// A QuotasChange is what became of the quotas of an instance, or in a dry run would.
type QuotasChange struct {
	Quotas      []apikey.Quota  // all of them then, by name
	Changes     []QuotaChange   // by name; what stays as it is is not in it
	Revision    apikey.Revision // of Quotas; in a dry run of what is there
	Propagation Propagation     // zero in a dry run
}

// Quota returns one of them.
func (c *QuotasChange) Quota(name string) apikey.Quota {
	return c.Quotas[slices.IndexFunc(c.Quotas, named(name))]
}

// A QuotaSet is quotas that are to be there together.
type QuotaSet struct {
	Quotas []QuotaInput `json:"quotas" strict:"notnull" required:"true" nullable:"false" maxItems:"256" doc:"Each is created, or replaces the one of its name."`
	Prune  bool         `json:"prune,omitempty" doc:"true: quotas that are not in the set are deleted."`
	DryRun bool         `json:"dryRun,omitempty" doc:"true: nothing is changed, and the answer says what would be."`
}

// PutQuota creates a quota or replaces the one of that name. Counts that run go on under the new numbers.
// ifMatch is the Revision that the caller saw, [IfThere] for a quota that is there, 0 for whatever it is now.
// Errors: [ErrPrecondition].
func (s *Service) PutQuota(ctx context.Context, caller Caller, instanceID, name string, in QuotaInput, ifMatch apikey.Revision) (QuotasChange, error) {
	id, err := caller.mayIn(instanceID, putQuota)
	if err != nil {
		return QuotasChange{}, err
	}
	if in.Name != "" && in.Name != name {
		return QuotasChange{}, apikey.Invalid("name", "is not the one in the address: a quota cannot be renamed")
	}
	in.Name = name
	if err := in.secretFree(s.cfg.Format, ""); err != nil {
		return QuotasChange{}, err
	}
	q, err := in.Quota()
	if err != nil {
		return QuotasChange{}, err
	}
	return s.changeQuotas(ctx, caller, id, ifMatch, false, func(old []apikey.Quota) ([]apikey.Quota, error) {
		others := without(old, named(name))
		if ifMatch == IfThere && len(others) == len(old) {
			return nil, ErrPrecondition
		}
		return append(others, q), nil
	})
}

// DeleteQuota removes a quota. What keys have instead of it stays with them, and says nothing until there is
// a quota of that name again. Errors: apikey.ErrNotFound, [ErrPrecondition].
func (s *Service) DeleteQuota(ctx context.Context, caller Caller, instanceID, name string, ifMatch apikey.Revision) (QuotasChange, error) {
	id, err := caller.mayIn(instanceID, deleteQuota)
	if err != nil {
		return QuotasChange{}, err
	}
	return s.changeQuotas(ctx, caller, id, ifMatch, false, func(old []apikey.Quota) ([]apikey.Quota, error) {
		left := without(old, named(name))
		if len(left) == len(old) {
			return nil, apikey.ErrNotFound
		}
		return left, nil
	})
}

// ApplyQuotas makes the quotas of an instance what a set says, all of it or nothing. Errors: as PutQuota,
// for all that is wrong at once.
func (s *Service) ApplyQuotas(ctx context.Context, caller Caller, instanceID string, set QuotaSet, ifMatch apikey.Revision) (QuotasChange, error) {
	id, err := caller.mayIn(instanceID, putQuota)
	if err != nil {
		return QuotasChange{}, err
	}
	if set.Prune {
		if err := caller.may(deleteQuota); err != nil {
			return QuotasChange{}, err
		}
	}
	quotas, err := quotasOf(s.cfg.Format, set.Quotas)
	if err != nil {
		return QuotasChange{}, err
	}
	return s.changeQuotas(ctx, caller, id, ifMatch, set.DryRun, func(old []apikey.Quota) ([]apikey.Quota, error) {
		if set.Prune {
			return quotas, nil
		}
		replaced := func(q apikey.Quota) bool { return slices.ContainsFunc(quotas, named(q.Name)) }
		return append(without(old, replaced), quotas...), nil
	})
}

// without returns a copy of list without what is out.
func without(list []apikey.Quota, out func(apikey.Quota) bool) []apikey.Quota {
	return slices.DeleteFunc(slices.Clone(list), out)
}

// changeQuotas gives an instance the quotas that change makes of those it has, in one transaction with an
// audit event for each that differs. A change of nothing is no change.
func (s *Service) changeQuotas(ctx context.Context, caller Caller, id string, ifMatch apikey.Revision, dryRun bool,
	change func(old []apikey.Quota) ([]apikey.Quota, error)) (QuotasChange, error) {
	var done QuotasChange
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		in, err := tx.Instance(ctx, id)
		if err != nil {
			return err
		}
		if ifMatch != 0 && ifMatch != IfThere && ifMatch != in.Revision {
			return ErrPrecondition
		}
		old := in.Quotas
		if in.Quotas, err = change(old); err != nil {
			return err
		}
		if len(in.Quotas) > apikey.MaxQuotas {
			return apikey.Invalid("quotas", fmt.Sprintf("would be %d: %d is the most that an instance can have", len(in.Quotas), apikey.MaxQuotas))
		}
		slices.SortFunc(in.Quotas, func(a, b apikey.Quota) int { return strings.Compare(a.Name, b.Name) })
		done = QuotasChange{Quotas: in.Quotas, Changes: quotaChanges(old, in.Quotas), Revision: in.Revision}
		if dryRun || len(done.Changes) == 0 {
			return errNothing
		}
		if err := tx.PutInstance(ctx, in); err != nil {
			return err
		}
		for _, c := range done.Changes {
			action := putQuota
			var before, after any // nil interfaces where there is nothing
			if c.Before != nil {
				before = c.Before
			}
			if c.After != nil {
				after = c.After
			} else {
				action = deleteQuota
			}
			if err := caller.audit(ctx, tx, action, id, c.Name(), before, after); err != nil {
				return err
			}
		}
		return nil
	})
	switch {
	case errors.Is(err, errNothing) && dryRun:
		return done, nil
	case errors.Is(err, errNothing):
		// It may still be on its way from when it was made.
		if rev, err = s.head(ctx); err != nil {
			return QuotasChange{}, err
		}
	case err != nil:
		return QuotasChange{}, err
	default:
		done.Revision = rev
	}
	done.Propagation = s.propagate(ctx, rev, revokeWait)
	return done, nil
}

// quotaChanges lists what differs, by name.
func quotaChanges(before, after []apikey.Quota) []QuotaChange {
	by := map[string]QuotaChange{}
	for i := range before {
		by[before[i].Name] = QuotaChange{Before: &before[i]}
	}
	for i := range after {
		c := by[after[i].Name]
		c.After = &after[i]
		by[after[i].Name] = c
	}
	var changes []QuotaChange
	for _, name := range slices.Sorted(maps.Keys(by)) {
		if c := by[name]; c.Before == nil || c.After == nil || *c.Before != *c.After {
			changes = append(changes, c)
		}
	}
	return changes
}

// overrides checks what a key of a type is to have instead of quotas of its instance.
func overrides(quotas []apikey.Quota, t apikey.Type, list map[string]apikey.QuotaOverride) error {
	if len(list) > apikey.MaxQuotas {
		return apikey.Invalid("quotas", fmt.Sprintf("has more than %d entries", apikey.MaxQuotas))
	}
	var bad faults
	unknown := false
	for _, name := range slices.Sorted(maps.Keys(list)) {
		if i := slices.IndexFunc(quotas, named(name)); i < 0 {
			unknown = true
		} else {
			bad.add(quotas[i].ValidateOverride("quotas."+name, t, list[name]))
		}
	}
	if unknown { // the name is not repeated: it may be a secret
		bad.add(apikey.Invalid("quotas", "names a quota that the instance does not have: "+haveQuotas(quotas)))
	}
	return bad.err()
}

// haveQuotas tells somebody who mistyped a name what there is.
func haveQuotas(quotas []apikey.Quota) string {
	const most = 10
	if len(quotas) == 0 {
		return "it has none"
	}
	var names []string
	for _, q := range quotas[:min(len(quotas), most)] {
		names = append(names, q.Name)
	}
	if len(quotas) > most {
		names = append(names, "…")
	}
	return "it has " + strings.Join(names, ", ")
}

// patchQuotas returns the overrides that a patch leaves, and those of them that it makes or changes.
func patchQuotas(old map[string]apikey.QuotaOverride, patch Member[map[string]*apikey.QuotaOverride]) (left, said map[string]apikey.QuotaOverride) {
	left, said = map[string]apikey.QuotaOverride{}, map[string]apikey.QuotaOverride{}
	if !patch.Null {
		maps.Copy(left, old)
	}
	for name, own := range patch.Value {
		if own == nil {
			delete(left, name)
			continue
		}
		if before, ok := old[name]; !ok || before != *own {
			said[name] = *own
		}
		left[name] = *own
	}
	switch {
	case len(left) > 0:
	case len(old) == 0: // nil and empty are the same, and no change
		left = old
	default:
		left = nil
	}
	return left, said
}

// sameOverrides: absent and empty are the same.
func sameOverrides(a, b map[string]apikey.QuotaOverride) bool {
	return len(a) == 0 && len(b) == 0 || reflect.DeepEqual(a, b)
}

// usersQuotas refuses overrides, lower ones too, as usersLimits does.
func usersQuotas() error {
	return &ForbiddenError{Field: "quotas", Reason: "are not the role user's to choose: the instance's quotas have them"}
}
