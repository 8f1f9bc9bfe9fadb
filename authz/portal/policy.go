package portal

import (
	"errors"
	"maps"
	"net/http"
	"slices"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// policyPages registers the policy of an instance: every field, what holds where it says nothing, and its changes,
// which are shown before they are made.
func (p *portal) policyPages() {
	p.page("Policy", "GET /instances/{instance}/policy", p.policy)
	p.page("Policy", "POST /instances/{instance}/policy", p.putPolicy)
}

// A policyView is the form of a policy.
type policyView struct {
	Revision apikey.Revision
	Groups   []policyGroupView
	Faults   []fault
	Conflict []policyChange // what somebody else changed meanwhile
	Changed  bool           // by somebody else
	MayPut   bool
	Disabled bool
}

// A policyGroupView is a group of the form with what its fields hold.
type policyGroupView struct {
	Title, Text string
	Fields      fieldList
}

// policyGroups fills in the form.
func policyGroups(values policyValues) []policyGroupView {
	shipped := policyInForce(new(apikey.Policy))
	groups := make([]policyGroupView, len(policyForm))
	for i, group := range policyForm {
		view := policyGroupView{Title: group.title, Text: group.text}
		for _, f := range group.fields {
			one := field{Name: f.name, Label: f.label, Help: f.help, Value: values[f.name]}
			inherited := f.read(shipped[f.name])
			switch f.kind {
			case policyCount:
				one.Kind, one.Empty = "number", inherited
			case policyDuration:
				one.Kind, one.Empty, one.Max = "text", inherited, 16
			case policyNumbers:
				one.Kind, one.Empty, one.Max = "text", inherited, 32
			case policyYesNo:
				one.Kind, one.Choices = "choice", []choice{{"", "as shipped: " + inherited}, {"yes", "yes"}, {"no", "no"}}
			case policySwitch:
				one.Kind = "switch"
			case policyScopes:
				one.Kind, one.Max = "lines", 16<<10
			case policyChoice:
				one.Kind = "choice"
				one.Choices = []choice{{"", "as shipped: " + inherited}}
				for _, c := range f.choices {
					one.Choices = append(one.Choices, choice{c, c})
				}
			}
			view.Fields = append(view.Fields, one)
		}
		groups[i] = view
	}
	return groups
}

func (p *portal) policy(w http.ResponseWriter, v *visit) error {
	in, err := p.svc.Instance(v.Context(), v.Caller, v.Instance)
	if err != nil {
		return err
	}
	return p.show(w, v, "policy", "Policy", policyView{
		Revision: in.Revision, Groups: policyGroups(policyValuesOf(&in.Policy)), MayPut: v.Can("instance.put"), Disabled: in.Policy.Disabled,
	})
}

// A policyPreview is what a change of the policy would do.
type policyPreview struct {
	Revision apikey.Revision
	Changes  []policyChange
	Hidden   []choice
	Disables bool // all keys, which worked
}

// putPolicy shows what the form would change, and then changes it.
func (p *portal) putPolicy(w http.ResponseWriter, v *visit) error {
	revision, err := revisionOf(v)
	if err != nil {
		return err
	}
	values := policyValues{}
	var sent []choice
	for _, group := range policyForm {
		for _, f := range group.fields {
			if value := v.PostForm.Get(f.name); value != "" {
				values[f.name] = value
				sent = append(sent, choice{f.name, value})
			}
		}
	}
	in, err := p.svc.Instance(v.Context(), v.Caller, v.Instance)
	if err != nil {
		return err
	}
	again := func(status int, err error) error { return p.policyAgain(w, v, status, revision, in, values, err) }
	if v.PostForm.Get("do") == "edit" {
		return again(http.StatusOK, nil)
	}
	input, err := values.input()
	if err != nil {
		return again(http.StatusBadRequest, err)
	}
	policy, err := input.Policy()
	if err != nil {
		return again(http.StatusBadRequest, err)
	}
	if v.PostForm.Get("do") != "apply" {
		if in.Revision != revision {
			return again(http.StatusPreconditionFailed, admin.ErrPrecondition)
		}
		return p.show(w, v, "policypreview", "What would change", policyPreview{
			Revision: revision, Changes: policyChanges(policyInForce(&in.Policy), policyInForce(&policy)), Hidden: sent,
			Disables: policy.Disabled && !in.Policy.Disabled,
		})
	}
	done, err := p.svc.PutInstanceIf(v.Context(), v.Caller, v.Instance, policy, revision)
	if err != nil {
		return again(statusOf(err), err)
	}
	return p.done(w, v, v.Path("policy"), "The policy is as you said"+"."+everywhere(done.Propagation))
}

// policyAgain shows the form again with what was entered and what is wrong with it. in is how the instance is now.
func (p *portal) policyAgain(w http.ResponseWriter, v *visit, status int, revision apikey.Revision, in *apikey.Instance, entered policyValues, err error) error {
	faults, rest := faultsOf(err)
	conflict := len(rest) == 1 && errors.Is(rest[0], admin.ErrPrecondition)
	if len(rest) > 0 && !conflict {
		return err
	}
	data := policyView{Revision: revision, Groups: policyGroups(entered), MayPut: v.Can("instance.put"), Disabled: in.Policy.Disabled, Changed: conflict}
	if conflict {
		if in, err = p.svc.Instance(v.Context(), v.Caller, v.Instance); err != nil {
			return err
		}
		data.Revision = in.Revision // who sends it again has seen what is there now
		data.Conflict = policyDiffers(policyValuesOf(&in.Policy), entered)
	}
	left := faults
	for i := range data.Groups {
		rest := map[string]string{}
		for field, reason := range left {
			rest[field] = reason
		}
		list := data.Groups[i].Fields
		for j := range list {
			name := "policy." + list[j].Name
			for field, reason := range left {
				// A scope is named by its place in the list.
				if field == name || len(field) > len(name) && field[:len(name)] == name && (field[len(name)] == '[' || field[len(name)] == '.') {
					list[j].Fault = upper(reason) + "."
					delete(rest, field)
				}
			}
		}
		left = rest
	}
	for i := range data.Groups {
		data.Faults = append(data.Faults, data.Groups[i].Fields.faults()...)
	}
	for _, field := range slices.Sorted(maps.Keys(left)) {
		data.Faults = append(data.Faults, fault{Text: (&apikey.InvalidError{Field: field, Reason: left[field]}).Error()})
	}
	return p.showAs(w, v, status, "policy", "Policy", data)
}

// policyDiffers lists where two forms differ: what there is now, and what was entered.
func policyDiffers(there, entered policyValues) []policyChange {
	normal := func(f *policyField, value string) string {
		if value == "" && f.kind != policySwitch && f.kind != policyScopes {
			return "inherited"
		}
		return f.read(value)
	}
	var list []policyChange
	for _, group := range policyForm {
		for i := range group.fields {
			f := &group.fields[i]
			if a, b := normal(f, there[f.name]), normal(f, entered[f.name]); a != b {
				list = append(list, policyChange{group.title, f.label, a, b})
			}
		}
	}
	return list
}
