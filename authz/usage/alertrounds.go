package usage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// lead does what one process does for all: it looks after the alerts that are open, and once an hour looks keys
// through and forgets what is old.
func (a *Alerts) lead(ctx context.Context) error {
	leads, err := a.store.Lead(ctx, alertsJob, a.cfg.Holder, alertsTTL)
	if err != nil || !leads {
		return err
	}
	instances, err := a.store.Instances(ctx)
	if err != nil {
		return err
	}
	policies := map[string]apikey.Alerts{}
	for _, in := range instances {
		policies[in.ID] = in.Policy.Alerts.InForce()
	}
	policies[""], _, _ = a.policy(ctx, "")
	errs := []error{a.look(ctx, policies)}
	if begin := time.Now(); begin.Sub(a.visited) >= visitEvery {
		at := alertTime()
		for _, in := range instances {
			// Again: a round over many instances may take longer than the lead.
			if leads, err := a.store.Lead(ctx, alertsJob, a.cfg.Holder, alertsTTL); err != nil || !leads {
				return errors.Join(append(errs, err)...)
			}
			policy := policies[in.ID]
			errs = append(errs, a.visitExpiring(ctx, in.ID, policy.Expiring, at), a.visitUnused(ctx, in.ID, policy.Unused, at))
		}
		errs = append(errs, a.store.ForgetAlerts(ctx, at.Add(-a.cfg.Keep)), a.store.ForgetNetworks(ctx, at.Add(-forgetNetwork)), a.forgetNotices(ctx, at))
		if err := errors.Join(errs...); err != nil {
			return err
		}
		a.visited = begin
	}
	return errors.Join(errs...)
}

// forgetNotices removes what a webhook should have been told that is configured no more. Another replica may have one
// still, so it stays for its day.
func (a *Alerts) forgetNotices(ctx context.Context, now time.Time) error {
	if a.cfg.Notify {
		return nil // the webhook does it, and tells of it
	}
	late, over, err := a.store.ForgetNotices(ctx, now.Add(-WebhookGivesUp), maxNotices)
	if n := late + over; n > 0 {
		a.log.LogAttrs(ctx, slog.LevelWarn, "what a webhook had to be told was dropped: none is configured any more", slog.Int("number", n))
	}
	return err
}

// look asks of each open alert whether it is over, of so many in a round.
func (a *Alerts) look(ctx context.Context, policies map[string]apikey.Alerts) error {
	var errs []error
	for looked := 0; looked < maxLooked; {
		page, err := a.store.Alerts(ctx, admin.AlertQuery{Everywhere: true, Open: true, After: a.after, Limit: alertPage})
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		for _, one := range page {
			policy, there := policies[one.InstanceID]
			if !there {
				continue // made meanwhile, or gone with its alerts
			}
			errs = append(errs, a.lookAt(ctx, one, &policy))
		}
		looked += len(page)
		if len(page) < alertPage {
			a.after = admin.AlertPlace{}
			break
		}
		a.after = placeOf(page[len(page)-1])
	}
	return errors.Join(errs...)
}

// lookAt resolves one alert if it is over.
func (a *Alerts) lookAt(ctx context.Context, one *admin.Alert, policy *apikey.Alerts) error {
	now := alertTime()
	if offIn(policy, one.Kind) {
		return a.resolve(ctx, one, nil, "alerts of this kind are switched off")
	}
	if one.Subject == subjectMore {
		a.mu.Lock()
		n := a.open[admin.AlertsOf{InstanceID: one.InstanceID, Kind: one.Kind}]
		a.mu.Unlock()
		if n <= maxOpen*9/10 {
			return a.resolve(ctx, one, nil, "there is room for others again")
		}
		return nil
	}
	var k *apikey.Key
	if !one.KeyID.IsZero() {
		var err error
		if k, err = a.store.Key(ctx, one.InstanceID, one.KeyID); err != nil && !errors.Is(err, apikey.ErrNotFound) {
			return err
		}
		if k == nil {
			return a.resolve(ctx, one, nil, "the key is gone")
		}
	}
	switch one.Kind {
	case admin.AlertRefusals:
		window := policy.Refusals.Window.Std()
		at := alertPlace{one.InstanceID, one.KeyID}
		s, err := a.surge(ctx, at, window)
		switch {
		case err != nil:
			return err
		case s.goesOn(surgeAtLeast(at, policy)):
			of := "the instance"
			if k != nil {
				of = nameOf(k)
			}
			return a.goesOn(ctx, one, s.lasting(of, window), lookEvery)
		case now.Sub(one.SeenAt) >= surgeOver*window:
			return a.resolve(ctx, one, k, "as few are refused as before")
		}
		return nil
	case admin.AlertUnknownKeys:
		peak, err := a.flood(ctx, one.InstanceID)
		switch {
		case err != nil:
			return err
		case 2*peak >= int64(policy.UnknownKeys.PerMinute):
			return a.goesOn(ctx, one, floodMessage(peak), lookEvery)
		case now.Sub(one.SeenAt) >= floodOver:
			return a.resolve(ctx, one, nil, "it has stopped")
		}
		return nil
	}
	if k == nil { // the other kinds are about a key
		return a.resolve(ctx, one, nil, "it is about no key")
	}
	if status := admin.RecordOf(k, now).Status; status != "active" {
		return a.resolve(ctx, one, k, "the key is "+status)
	}
	switch one.Kind {
	case admin.AlertNewNetwork:
		if now.Sub(one.SeenAt) >= networkOpen {
			return a.resolve(ctx, one, k, "it is new no more")
		}
		return nil
	case admin.AlertExpiring:
		stage := stageOf(k, now, policy.Expiring.Days)
		switch {
		case stage == 0:
			return a.resolve(ctx, one, k, "the key does not expire soon any more, or is not in use")
		case expiringSubject(stage) != one.Subject:
			return errors.Join(a.resolve(ctx, one, k, "the next one is opened"), a.expiring(ctx, k, stage))
		}
		return a.goesOn(ctx, one, expiringMessage(k), seenAgain)
	case admin.AlertUnused:
		if subject := unusedSubject(k, now, policy.Unused); subject != one.Subject {
			return a.resolve(ctx, one, k, "the key was used")
		}
		return a.goesOn(ctx, one, unusedMessage(k), seenAgain)
	}
	return nil
}

func offIn(policy *apikey.Alerts, kind admin.AlertKind) bool {
	return map[admin.AlertKind]bool{
		admin.AlertNewNetwork: policy.NewNetwork.Disabled, admin.AlertRefusals: policy.Refusals.Disabled, admin.AlertUnknownKeys: policy.UnknownKeys.Disabled,
		admin.AlertExpiring: policy.Expiring.Disabled, admin.AlertUnused: policy.Unused.Disabled,
	}[kind]
}

// goesOn notes that what an alert tells of still is so, unless that was noted within a time.
func (a *Alerts) goesOn(ctx context.Context, one *admin.Alert, message string, within time.Duration) error {
	now := alertTime()
	if now.Sub(one.SeenAt) < within {
		return nil
	}
	one.Message, one.SeenAt = message, now
	one.Count++
	err := a.store.PutAlert(ctx, one)
	if errors.Is(err, apikey.ErrConflict) || errors.Is(err, apikey.ErrNotFound) {
		return nil
	}
	return err
}

// openOf returns the keys and subjects of the alerts of a kind that are open in an instance.
func (a *Alerts) openOf(ctx context.Context, instance string, kind admin.AlertKind) (map[string]bool, error) {
	open := map[string]bool{}
	q := admin.AlertQuery{InstanceID: instance, Kind: kind, Open: true, Limit: alertPage}
	for {
		page, err := a.store.Alerts(ctx, q)
		if err != nil {
			return nil, err
		}
		for _, one := range page {
			open[one.KeyID.String()+one.Subject] = true
		}
		if len(page) < q.Limit {
			return open, nil
		}
		q.After = placeOf(page[len(page)-1])
	}
}

// visit calls judge with the keys of an instance that a query means, page by page, but no more than maxVisited. It
// stops where judge says that it is enough.
func (a *Alerts) visit(ctx context.Context, instance string, q admin.KeyQuery, judge func(*apikey.Key) (more bool, err error)) error {
	q.Limit = alertPage
	for visited := 0; visited < maxVisited; {
		page, err := a.store.Keys(ctx, instance, q)
		if err != nil {
			return err
		}
		for _, k := range page {
			if more, err := judge(k); err != nil || !more {
				return err
			}
		}
		if visited += len(page); len(page) < q.Limit {
			return nil
		}
		q.After = q.Order.PlaceOf(page[len(page)-1])
	}
	return nil
}

// full reports whether no more alerts of a kind can be opened in an instance.
func (a *Alerts) full(instance string, kind admin.AlertKind) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.open[admin.AlertsOf{InstanceID: instance, Kind: kind}] > maxOpen // with the one that says so
}

func (a *Alerts) visitExpiring(ctx context.Context, instance string, policy apikey.ExpiringKeyAlerts, now time.Time) error {
	if policy.Disabled {
		return nil
	}
	open, err := a.openOf(ctx, instance, admin.AlertExpiring)
	if err != nil {
		return err
	}
	first := time.Duration(policy.Days[0]) * dayLong
	return a.visit(ctx, instance, admin.KeyQuery{
		KeyFilter: admin.KeyFilter{ExpiresBefore: now.Add(first)}, Order: admin.OrderExpiration,
		After: admin.KeyPlace{At: now}, // not those that have expired: there may be many
	}, func(k *apikey.Key) (bool, error) {
		stage := stageOf(k, now, policy.Days)
		if stage == 0 || open[k.ID.String()+expiringSubject(stage)] || admin.RecordOf(k, now).Status != "active" {
			return true, nil
		}
		err := a.expiring(ctx, k, stage)
		return !a.full(instance, admin.AlertExpiring), err
	})
}

func (a *Alerts) expiring(ctx context.Context, k *apikey.Key, stage int) error {
	return a.see(ctx, admin.Alert{
		InstanceID: k.InstanceID, Kind: admin.AlertExpiring, KeyID: k.ID, Subject: expiringSubject(stage), Message: expiringMessage(k),
	}, k)
}

func expiringMessage(k *apikey.Key) string {
	return fmt.Sprintf("%s is in use and expires at %s: rotate it, or give it another date", nameOf(k), k.ExpirationDate.UTC().Format(time.RFC3339))
}

func (a *Alerts) visitUnused(ctx context.Context, instance string, policy apikey.UnusedKeyAlerts, now time.Time) error {
	if policy.Disabled {
		return nil
	}
	open, err := a.openOf(ctx, instance, admin.AlertUnused)
	if err != nil {
		return err
	}
	judge := func(subject string) func(k *apikey.Key) (bool, error) {
		return func(k *apikey.Key) (bool, error) {
			if unusedSubject(k, now, policy) != subject || open[k.ID.String()+subject] {
				return true, nil
			}
			err := a.see(ctx, admin.Alert{InstanceID: instance, Kind: admin.AlertUnused, KeyID: k.ID, Subject: subject, Message: unusedMessage(k)}, k)
			return !a.full(instance, admin.AlertUnused), err
		}
	}
	before := func(days int) admin.KeyFilter {
		return admin.KeyFilter{Status: "active", UnusedSince: now.Add(-time.Duration(days) * dayLong)}
	}
	never := before(policy.NeverUsedDays)
	never.NeverUsed = true
	return errors.Join(
		a.visit(ctx, instance, admin.KeyQuery{KeyFilter: before(policy.IdleDays), Order: admin.OrderLastUsed, Now: now}, judge(subjectIdle)),
		a.visit(ctx, instance, admin.KeyQuery{KeyFilter: never, Order: admin.OrderLastUsed, Now: now}, judge(subjectNeverUsed)),
	)
}

func unusedMessage(k *apikey.Key) string {
	if k.LastUsedAt.IsZero() {
		return fmt.Sprintf("%s was never used since %s: disable or revoke it if nobody needs it", nameOf(k), quietSince(k).UTC().Format(time.DateOnly))
	}
	return fmt.Sprintf("%s was last used on %s: disable or revoke it if nobody needs it", nameOf(k), k.LastUsedAt.UTC().Format(time.DateOnly))
}
